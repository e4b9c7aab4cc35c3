"""How trainers publish: the same complete repository as `proclip publish`, at the end and while they train."""

import logging
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from hub_cards.checkpoint_facts import is_hub_name
from hub_cards.hub_errors import readable_hub_errors
from hub_cards.other_staging import stage_resumable
from hub_cards.publish import PublishReport, full_name, make_repository, publish
from modeling_proclip import ProCLIPModel

from .checkpoints import complete


# Folders of links to a checkpoint that is being sent.
_LINKS = "_push-"

logger = logging.getLogger(__name__)


class Publisher:
    """Sends what [`publish`] sends of a folder (checkpoint, processor, code and card in one commit) to one repository, made if it is not there.

    Args:
        args: `hub_model_id` (by default the name of `output_dir`), `hub_token`, `hub_private_repo` (private unless `False`), `hub_revision`
            and `hub_strategy`.
        model, processing_class: What is to be sent later.
        token, private: In place of those of `args`.

    Raises:
        ValueError: If what is to be sent could not be: the model is no [`ProCLIPModel`], its LLM has no name on the Hub, or there is no
            processor; or if the Hub says no.
    """

    def __init__(
        self,
        args: TrainingArguments,
        model: nn.Module,
        processing_class: Any,
        token: str | None = None,
        private: bool | None = None,
    ):
        _check_publishable(model, processing_class)
        self.args = args
        token = args.hub_token if token is None else token
        self.repo_id = full_name(args.hub_model_id or Path(args.output_dir).absolute().name, token)
        make_repository(self.repo_id, args.hub_private_repo if private is None else private, token)
        self._background = HfApi(token=token)  # sends one thing after the other
        for left in Path(args.output_dir).glob(f"{_LINKS}*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)

    def publish(
        self,
        folder: str | Path,
        message: str | None,
        *,
        blocking: bool,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> PublishReport | Future:
        """Send `folder`; without `blocking` in the background. The other arguments are used in place of those of `args`."""
        settings = self._settings(message, token, revision, private)
        if not blocking:
            return self._background.run_as_future(publish, folder, self.repo_id, **settings)
        return publish(folder, self.repo_id, **settings)

    def publish_checkpoint(self, folder: Path, step: int) -> Future:
        """Send a checkpoint in the background, from links to its files, as it may be rotated away meanwhile; with `hub_strategy="checkpoint"` or
        "all_checkpoints" also what a training resumes from.
        """
        links = folder.with_name(f"{_LINKS}{step}")
        shutil.rmtree(links, ignore_errors=True)
        shutil.copytree(folder, links, copy_function=_link)
        whole = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        return self._background.run_as_future(
            self._publish_and_remove, links, f"Training in progress, step {step}", whole.get(self.args.hub_strategy)
        )

    def _publish_and_remove(self, folder: Path, message: str, whole: str | None) -> None:
        """Send `folder`, and what a training resumes from into the folder `whole` of the repository."""
        try:
            publish(folder, self.repo_id, **self._settings(message))
            if whole is not None:
                self._send_whole(folder, whole, f"{message}, checkpoint")
        except Exception as error:  # nobody looks at what the future raised, and training goes on
            logger.error(f"{self.repo_id} did not get {message!r}: {error}")
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _send_whole(self, folder: Path, name: str, message: str) -> None:
        with TemporaryDirectory() as staging:
            stage_resumable(folder, Path(staging))
            complete(Path(staging))  # the manifest of the files as they are sent
            with readable_hub_errors(self.repo_id, self.args.hub_token):
                self._background.upload_folder(
                    repo_id=self.repo_id,
                    folder_path=staging,
                    path_in_repo=name,
                    commit_message=message,
                    revision=self.args.hub_revision,
                )

    def _settings(
        self, message: str | None, token: str | None = None, revision: str | None = None, private: bool | None = None
    ) -> dict[str, Any]:
        return {
            "message": message or "Training in progress",
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
            "private": self.args.hub_private_repo if private is None else private,
        }


def _check_publishable(model: nn.Module, processing_class: Any) -> None:
    if not isinstance(model, ProCLIPModel):
        raise ValueError(
            "push_to_hub sends a whole ProCLIPModel, and this trainer trains adapters of PEFT, which the model sends itself: leave it out and "
            "call trainer.model.push_to_hub(repo_id)"
        )
    name = model.config.text_model_name_or_path
    if name is None or not is_hub_name(name):
        raise ValueError(
            f"The checkpoints to publish leave out their LLM and name it, and {name!r} is not a name on the Hub: load the LLM by its name "
            "there, or set model.config.text_model_name_or_path and text_model_revision to that of the same LLM."
        )
    if processing_class is None:
        raise ValueError("A published checkpoint needs its processor: pass processing_class=processor to the trainer.")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
