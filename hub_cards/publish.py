"""`publish`: a checkpoint becomes a repository on the Hub that anybody can load, with or without this package."""

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging
from transformers.utils.hub import convert_file_size_to_int

from modeling_proclip.conversion.output import scratch_folder

from .errors import PublishError
from .hub_errors import readable_hub_errors
from .other_staging import stage_adapters, stage_processor
from .remote_code import code_files
from .scrubbing import scrub
from .sent_files import PROCESSOR_FILES
from .staging import Staged, stage


logger = logging.get_logger(__name__)

LIBRARY = "proclip-transformers"  # what requests to the Hub say sends them
MESSAGE = "ProCLIP checkpoint, published by proclip"
# Weights of an earlier state that Transformers might read in place of the new ones.
EARLIER_WEIGHTS = ("model.safetensors*", "model-*-of-*.safetensors", "pytorch_model*.bin*")


@dataclass(frozen=True)
class PublishReport:
    """What was sent or, in a dry run, would be.

    Attributes:
        repo_id: Name of the repository, with its owner once something was sent.
        url: Address of the repository; `None` in a dry run.
        commit: Hash of the commit; `None` in a dry run.
        files: Size of each file in bytes, by its name in the repository.
        removed: Names of the files that the commit removed: weights and code of an earlier state, which would be mistaken for these.
        left_out: Names of the files in the folder that are not sent.
        notes: Remarks for the user.
        lean: Whether the LLM is left out.
        text_model_bytes: Size in bytes of the LLM that a lean checkpoint names instead of holding it, in the dtype that it runs in.
    """

    repo_id: str
    url: str | None
    commit: str | None
    files: dict[str, int]
    removed: list[str]
    left_out: list[str]
    notes: list[str]
    lean: bool
    text_model_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    lean: bool | None = None,
    revision: str | None = None,
    message: str = MESSAGE,
    max_shard_size: int | str | None = None,
    with_code: bool = True,
    needs_processor: bool = True,
    text_model: str | None = None,
    text_model_revision: str | None = None,
    card: Mapping[str, Any] | None = None,
    token: str | None = None,
    dry_run: bool = False,
    announce: Callable[[PublishReport], None] | None = None,
) -> PublishReport:
    """Send a checkpoint to the Hub: weights, configuration, processor, the code that loads it where this package is not installed, and the card.

    The folder is checked first, which costs one pass over the weights. Only files with the names of a checkpoint's are sent, without local
    paths, passwords, tokens and references to code of others. Everything arrives in one commit, so a reader finds the repository as it was
    before, or complete. Large files are sent before the commit, and those that the Hub has are not sent again: a run that was interrupted or
    killed finishes when it is repeated.

    Args:
        folder: What `model.save_pretrained` and `processor.save_pretrained` wrote, or the PEFT adapters that `ProCLIPPeftModel` wrote. Its
            README.md is the card; without one, or if it is still what [`model_card`] wrote from the checkpoint alone, the card is rendered.
        repo_id: `owner/name` on the Hub; a name alone is the user's own.
        private: Whether only its owner sees a new repository: `None` means yes. One that is there keeps what it is, and is refused if it is
            public and this is not `False`.
        lean: Leave the LLM out (`True`) or put it in (`False`); by default as the checkpoint is. See [`ProCLIPModel.save_pretrained`].
        revision: Branch, made if it is not there. By default "main".
        message: Commit message.
        max_shard_size: Split the weights into files of at most this size, such as `"2GB"`: what an interruption can lose of a file. By
            default they are as in `folder`.
        with_code: Send the code. Without it the checkpoint loads only where this package is installed.
        needs_processor: Refuse a checkpoint without its processor; otherwise the repository keeps the one that it has.
        text_model, text_model_revision: Name on the Hub of the LLM of a lean checkpoint that names a folder of this machine. Its weights are
            fetched and compared.
        card: Arguments of [`model_card`], such as `license`, `base_licenses`, `datasets`, `languages` and `results`: the card is rendered with
            them, also in place of a README.md.
        token: Token for the Hub; by default that of `hf auth login` or `HF_TOKEN`. It is never printed.
        dry_run: Check everything, say what would be sent, and ask the Hub nothing (but for the LLM that `text_model` names).
        announce: Called with what is going to be sent, before it is.

    Returns:
        [`PublishReport`].

    Raises:
        PublishError: If the checkpoint is not complete, or the Hub does not take it; says which and what to do.
    """
    check_name(repo_id)
    if not dry_run:
        repo_id = full_name(repo_id, token)  # before anything that takes long: it tells whether the token is good
    folder, rewrites = Path(folder), lean is not None or max_shard_size is not None
    adapters = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    if adapters and (rewrites or text_model is not None):
        raise PublishError(
            f"{folder} holds PEFT adapters: lean, max_shard_size and text_model are for whole checkpoints."
        )
    with _staging_folder(folder, beside=rewrites and not dry_run) as staging:
        if adapters:
            staged = stage_adapters(folder, staging, repo_id, card=card)
        else:
            staged = stage(
                folder,
                staging,
                repo_id,
                lean=lean,
                max_shard_bytes=_in_bytes(max_shard_size),
                with_code=with_code,
                needs_processor=needs_processor,
                text_model=text_model,
                text_model_revision=text_model_revision,
                card=card,
                sketch=dry_run,
            )
        if dry_run:
            return _report(staged, repo_id)
        if announce is not None:
            announce(_report(staged, repo_id))
        return upload(staged, repo_id, private=private, revision=revision, message=message, token=token)


def publish_model(
    model: Any,
    repo_id: str,
    *,
    processor: Any = None,
    lean: bool | None = None,
    max_shard_size: int | str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    **settings: Any,
) -> PublishReport:
    """[`publish`] of a model in memory, as [`ProCLIPModel.push_to_hub`] does. Without `processor` the repository keeps the one that it has. `settings`
    are `private`, `revision` and `card`.
    """
    repo_id = full_name(repo_id, token)
    with TemporaryDirectory() as saved:
        kwargs = {"lean": lean, "max_shard_size": max_shard_size}
        model.save_pretrained(saved, **{key: value for key, value in kwargs.items() if value is not None})
        if processor is not None:
            processor.save_pretrained(saved)
        message = commit_message or MESSAGE
        return publish(saved, repo_id, needs_processor=processor is not None, message=message, token=token, **settings)


def publish_saved(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> PublishReport:
    """[`publish`] of a folder that a model was just saved to (`save_pretrained(push_to_hub=True)`), with its processor if it has one."""
    message = commit_message or MESSAGE
    return publish(
        folder, repo_id, needs_processor=False, private=private, revision=revision, message=message, token=token
    )


def publish_processor(
    processor: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> PublishReport:
    """Send a processor and its code, as [`ProCLIPProcessor.push_to_hub`] does: the other half of what [`publish_model`] sends without one."""
    repo_id = full_name(repo_id, token)
    with TemporaryDirectory() as saved, TemporaryDirectory() as staging:
        processor.save_pretrained(saved)
        staged = stage_processor(Path(saved), Path(staging))
        message = commit_message or "ProCLIP processor"
        return upload(staged, repo_id, private=private, revision=revision, message=message, token=token)


def upload(
    staged: Staged, repo_id: str, *, private: bool | None, revision: str | None, message: str, token: str | None
) -> PublishReport:
    """Send every file of `staged` in one commit, which also removes what [`publish`] sent before and does not send now."""
    make_repository(repo_id, private, token)
    api = HfApi(token=token, library_name=LIBRARY)
    with readable_hub_errors(repo_id, token):
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision).sha
        there = api.list_repo_files(repo_id, revision=head)
        removed = _stale(there, staged)
        operations: list[Any] = [CommitOperationAdd(name, staged.folder / name) for name in staged.files]
        operations += [CommitOperationDelete(name) for name in removed]
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=head)
    if "config.json" in staged.files and not set(PROCESSOR_FILES) & {*there, *staged.files}:
        logger.warning(f"{repo_id} has no processor yet: processor.push_to_hub({repo_id!r}) sends it.")
    return _report(staged, repo_id, f"{api.endpoint}/{repo_id}", commit.oid, removed)


def full_name(repo_id: str, token: str | None = None) -> str:
    """`owner/name`, where the user of the token owns what is given as a name alone. PublishError if the Hub does not know the token."""
    check_name(repo_id)
    with readable_hub_errors(repo_id, token):
        owner = HfApi(token=token, library_name=LIBRARY).whoami()["name"]
    return repo_id if "/" in repo_id else f"{owner}/{repo_id}"


def check_name(repo_id: str) -> None:
    """Refuse what is not the name of a repository, such as its address, and say which name was meant."""
    address = re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?:models/)?([^/?#]+/[^/?#]+)", repo_id)
    if address:
        raise PublishError(f"{repo_id!r} is an address: give the repository's name, {address[1]!r}.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(
            f"{scrub(repo_id)!r} is not the name of a repository: give OWNER/NAME, or NAME for one of your own; letters, digits, -, _ and . are allowed."
        ) from error


def make_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> None:
    """Make the repository if it is not there. PublishError if one that is there is not as private as it is to be; see [`publish`] for `private`."""
    api = HfApi(token=token, library_name=LIBRARY)
    with readable_hub_errors(repo_id, token):
        try:
            is_private = api.model_info(repo_id).private
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private is not False, exist_ok=True)
            return
    if is_private and private is False:
        raise PublishError(
            f"{repo_id} is there and private, and sending to it would not make it public: make it public in its settings, or leave --public "
            "(private=False) out."
        )
    if not is_private and private is not False:
        raise PublishError(
            f"{repo_id} is there and public, so all could see what you send: say --public (private=False) if they shall, or make it private in "
            "its settings."
        )


def _stale(there: list[str], staged: Staged) -> list[str]:
    if "config.json" not in staged.files:  # a processor replaces no model
        return []
    ours = (*EARLIER_WEIGHTS, *(file.name for file in code_files()))
    return [name for name in there if name not in staged.files and any(fnmatch(name, pattern) for pattern in ours)]


def _in_bytes(size: int | str | None) -> int | None:
    try:
        return None if size is None else convert_file_size_to_int(size)
    except ValueError as error:
        raise PublishError(
            f"max_shard_size {size!r} is not a size: give a number with its unit, such as 2GB."
        ) from error


@contextmanager
def _staging_folder(folder: Path, beside: bool) -> Iterator[Path]:
    """An empty folder, removed at the end: `beside` the checkpoint where it takes weights, else where temporary files are."""
    parent = folder.resolve().parent if beside else Path(gettempdir())
    try:
        with scratch_folder(parent, f".{folder.resolve().name}.publish-") as staging:
            yield staging
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise PublishError(
            f"The disk of {parent} has no space left for the weights as they are to be sent."
        ) from error


def _report(
    staged: Staged, repo_id: str, url: str | None = None, commit: str | None = None, removed: list[str] | None = None
) -> PublishReport:
    return PublishReport(
        repo_id,
        url,
        commit,
        removed=removed or [],
        **{name: value for name, value in vars(staged).items() if name != "folder"},
    )
