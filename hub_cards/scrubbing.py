"""Taking out of texts and JSON what others must not see: passwords in addresses, tokens, and where files lie on this machine.

Every pattern is linear in the length of the text: what is scrubbed may come from anybody.
"""

import re
from collections.abc import Container
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


HIDDEN = "***"
# The shapes of tokens that services document; the bounds keep the search linear.
_TOKEN = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        hf_[A-Za-z0-9]{20,200} | api_org_[A-Za-z0-9]{20,200}                            # Hugging Face
        | gh[opusr]_[A-Za-z0-9]{30,300} | github_pat_\w{30,300} | glpat-[\w-]{20,300}   # GitHub, GitLab
        | (?<!-)sk-(?=[\w-]{0,40}\d)[\w-]{32,300} | AIza[\w-]{35} | ya29\.[\w-]{20,3000}      # OpenAI, Anthropic, Google
        | (?:AKIA|ASIA)[0-9A-Z]{16} | xox[abeprs]-[\w-]{10,300}                         # AWS, Slack
        | pypi-[\w-]{20,300} | npm_[A-Za-z0-9]{30,300}
        | (?<![_-])eyJ[\w-]{10,3000}\.eyJ[\w-]{10,3000}\.[\w-]{1,3000}                           # JSON web tokens
    )""",
    re.VERBOSE,
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.DOTALL
)
_SECRET_NAME = re.compile(
    r"passw(?:or)?d|secret|api_?key|access_?key|private_?key|signature|credential|(?:hub|hf|access|auth|refresh|write|bearer|security)_?token",
    re.IGNORECASE,
)
# In an address also what would be too common elsewhere: `?token=`, Azure's `sig=`.
_SECRET_PARAMETER = re.compile(r"(?:.{0,50}[_.-])?(?:token|sig|key|auth|pwd|pass)", re.IGNORECASE)
_PATH_KEY = re.compile(r"\w{0,60}(?:path|dir|directory|folder|file|source|checkpoint)s?", re.IGNORECASE)
# `name: value`, `name=value` or `"name": "value"`; a value has a digit, as a word of prose rarely has.
_ASSIGNED = re.compile(
    r"(?<![\w-])([A-Za-z_-]{2,80})(['\"]?\s{0,3}[:=]\s{0,3}['\"]?)(?=[^\s'\"]{0,100}\d)([\w+/=.!@#%^-]{8,300})"
)
_BEARER = re.compile(r"(?<=Bearer )[\w.=+/-]{16,3000}")
_USERINFO = re.compile(r"(?<=://)[^\s/@\"'<>]{1,500}@")
_PARAMETER = re.compile(r"(?<=[?&])([\w.-]{1,60})=([^&\s\"'<>)#]+)")
# In prose only what begins like a home or a disk is taken for a path of this machine.
_PATH = re.compile(
    r"""(?<![\w.:/~<-])(?:
          (?:file://)?/(?:home|Users|root|tmp|mnt|media|data|scratch|work|workspace|private|Volumes|nfs|gpfs|lustre|fsx|storage|content
            |kaggle|opt|srv|var|projects?)
          | ~[\w.-]{0,60} | [A-Za-z]: | \\\\[\w.-]{1,60}
        )(?:[/\\](?![/\\])[^\s/\\"'`<>|()\[\]{},;]{1,300})+""",
    re.VERBOSE,
)


def scrub_text(text: str) -> str:
    """`text` without passwords, tokens and the folders of this machine: a secret becomes `***`, a path its last part."""
    text = _USERINFO.sub("", _PRIVATE_KEY.sub(HIDDEN, text))
    text = _BEARER.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))
    text = _PARAMETER.sub(_hide_parameter, text)
    text = _ASSIGNED.sub(lambda match: match[1] + match[2] + HIDDEN if _is_secret(match[1]) else match[0], text)
    home = str(Path.home())
    if len(home) > 1:  # wherever it is, also with spaces in it
        text = text.replace(home + "/", "~/")
    return _PATH.sub(lambda match: _last_part(match[0]), text)


def scrub(value: Any, keep: Container[str] = ()) -> Any:
    """[`scrub_text`] of every string in a JSON value, except under the keys `keep`. A string that is a path as a whole becomes its last part: an
    absolute one, one that begins with `./`, `../` or `~`, and under a key such as "name_or_path" any with more than one slash.
    """
    if isinstance(value, dict):
        return {scrub_text(key): part if key in keep else _scrub_entry(key, part, keep) for key, part in value.items()}
    if isinstance(value, list):
        return [scrub(part, keep) for part in value]
    if not isinstance(value, str):
        return value
    return scrub_text(_last_part(value) if is_local_path(value) else value)


def holds_secret(text: str) -> bool:
    """Whether `text` holds what reads as a token or a private key: for files that must stay as they are, such as a vocabulary."""
    return bool(_TOKEN.search(text) or _PRIVATE_KEY.search(text))


def is_local_path(value: str) -> bool:
    """Whether a string reads as a path of this machine: absolute, below a home, or relative by `./` or `../`. `/think` is none."""
    if not value or len(value) > 4096 or re.search(r"[\n{}]", value):
        return False
    windows = PureWindowsPath(value)
    absolute = value.startswith(("/", "file:")) and "/" in value.rstrip("/")[1:] and "</" not in value
    return absolute or bool(windows.drive and windows.root) or bool(re.match(r"(?:\.\.?|~[\w.-]*)[/\\]", value))


def _scrub_entry(key: str, value: Any, keep: Container[str]) -> Any:
    if not value or not isinstance(value, str):
        return scrub(value, keep)
    if _is_secret(key):
        return HIDDEN
    # A relative path has nothing that tells it from other text but its key; a name on the Hub has one slash.
    relative = _PATH_KEY.fullmatch(key) is not None and value.count("/") > 1 and "://" not in value
    return scrub_text(_last_part(value)) if relative else scrub(value, keep)


def _hide_parameter(match: re.Match[str]) -> str:
    secret = _is_secret(match[1]) or _SECRET_PARAMETER.fullmatch(match[1])
    return f"{match[1]}={HIDDEN}" if secret else match[0]


def _is_secret(name: str) -> bool:
    return _SECRET_NAME.search(name.replace("-", "_")) is not None


def _last_part(path: str) -> str:
    parts = PurePosixPath(path.replace("\\", "/")).parts
    return (
        "~" if len(parts) == 3 and parts[1] in ("home", "Users") else parts[-1]
    )  # a home's last part is a person's name
