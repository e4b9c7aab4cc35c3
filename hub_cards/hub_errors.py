"""What goes wrong between here and the Hub, in one message each, with what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # of the library that the client connects with: httpx in release 1, httpx2 in release 2
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from .errors import PublishError


LOG_IN = (
    "The Hub does not know your token, or there is none (401): log in by `hf auth login`, or set HF_TOKEN to a token of "
    "https://huggingface.co/settings/tokens that may write."
)
AGAIN = "Give the same command again: what the Hub has already is not sent twice."


@contextmanager
def readable_hub_errors(repo_id: str, token: str | None = None) -> Iterator[None]:
    """Turn what the Hub's client raises into a [`PublishError`] about `repo_id`. No message holds the token."""
    try:
        yield
    except (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, RuntimeError) as error:
        # For a large file that is refused the client raises a RuntimeError, whose cause says why.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        if isinstance(cause, HfHubHTTPError):
            message = _describe_status(cause, repo_id)
        elif isinstance(cause, LocalTokenNotFoundError):
            message = LOG_IN
        elif isinstance(cause, OfflineModeIsEnabled):
            message = "HF_HUB_OFFLINE is set, so nothing can be sent: unset it."
        elif isinstance(cause, HTTPError):
            message = f"The Hub at {constants.ENDPOINT} cannot be reached or hung up ({cause}). {AGAIN}"
        else:
            raise
        for secret in filter(None, (token, get_token())):
            message = message.replace(secret, "***")
        raise PublishError(" ".join(message.split())) from error


def _describe_status(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    answer = error.server_message or str(error).strip().split("\n")[0]
    if status == 401:
        return LOG_IN
    if status == 403:
        return (
            f"Your token may not write to {repo_id} (403: {answer}). Take a token that may write, of https://huggingface.co/settings/tokens, or a "
            "name of your own: a name without an owner is yours."
        )
    if status in (409, 412):
        return f"Somebody else changed {repo_id} meanwhile ({status}: {answer}). Look at it, then give the same command again."
    if status == 429:
        return f"The Hub asks for fewer requests (429: {answer}). Wait a few minutes. {AGAIN}"
    if status >= 500:
        return f"The Hub failed ({status}: {answer}). {AGAIN}"
    return f"The Hub refuses {repo_id} ({status}: {answer})."
