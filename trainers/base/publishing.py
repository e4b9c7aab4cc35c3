"""How trainers publish: the same complete repository as `proclip publish`, at the end and while they train."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from hub_cards.checkpoint_facts import is_hub_name
from hub_cards.publish import PublishReport, full_name, make_repository, publish
from modeling_proclip import ProCLIPModel


logger = logging.getLogger(__name__)


class PublishingTrainer(Trainer):
    """
    A Trainer whose `push_to_hub` and `hub_strategy` send what [`publish`] sends: checkpoint, processor, code and card in one commit, and
    nothing else of `output_dir`. Transformers' own send whatever lies there, pickles included, and no code.

    Repositories are private unless `hub_private_repo=False`. The LLM, which is not trained, stays out; it must have a name on the Hub, which is
    checked before training. With `hub_strategy="checkpoint"` or `"all_checkpoints"` the whole checkpoint to resume from is sent too, as
    Transformers does it, optimizer and random states (pickles) included.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        As Trainer, private by default.

        Raises:
            ValueError: If what would be sent later could not be: the LLM has no name on the Hub, there is no processor, or the Hub says no.
        """
        if not self.is_world_process_zero():
            return
        if not isinstance(self.model, ProCLIPModel):
            raise ValueError("PEFT adapters are sent by the model: trainer.model.push_to_hub(repo_id)")
        name = self.model.config.text_model_name_or_path
        if name is None or not is_hub_name(name):
            raise ValueError(
                f"The checkpoints to publish leave out their LLM and name it, and {name!r} is no name on the Hub: load the LLM by its name "
                "there, or set model.config.text_model_name_or_path and text_model_revision to that of the same LLM."
            )
        if self.processing_class is None:
            raise ValueError(
                "A published checkpoint needs its processor: pass processing_class=processor to the trainer."
            )
        token = self.args.hub_token if token is None else token
        private = self.args.hub_private_repo if private is None else private
        repo_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self.hub_model_id = full_name(repo_id, token)
        make_repository(self.hub_model_id, private, token)
        self.push_in_progress: PushInProgress | None = None
        self._background = HfApi(token=token)  # sends one thing after the other

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Save model, processor and card to `output_dir`, and [`publish`] it.

        Args:
            commit_message, token, revision, private: As [`~transformers.Trainer.push_to_hub`].
            blocking: Whether to wait until it is sent.
            kwargs: Of `create_model_card`.

        Returns:
            [`PublishReport`], or a `Future` of it if `blocking=False`; `None` on other processes than the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        model, text_model = self.model, self.model.text_model
        model.text_model = None  # saved lean
        try:
            self.save_model(_internal_call=True)
        finally:
            model.text_model = text_model
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        settings = self._publish_settings(commit_message, token, revision, private)
        if not blocking:
            return self._background.run_as_future(publish, self.args.output_dir, self.hub_model_id, **settings)
        return publish(self.args.output_dir, self.hub_model_id, **settings)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish a checkpoint in the background, from links to its files: it may be rotated away meanwhile."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        links = Path(self.args.output_dir, f"_push-{self.state.global_step}")
        shutil.rmtree(links, ignore_errors=True)
        shutil.copytree(checkpoint_folder, links, copy_function=_link)
        settings = self._publish_settings(message, self.args.hub_token, self.args.hub_revision, None)
        jobs: list[Any] = [self._background.run_as_future(_publish_and_remove, links, self.hub_model_id, **settings)]
        whole = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name}
        if path := whole.get(self.args.hub_strategy):
            jobs.append(
                self._background.upload_folder(
                    repo_id=self.hub_model_id,
                    folder_path=checkpoint_folder,
                    path_in_repo=path,
                    commit_message=f"{message}, checkpoint",
                    revision=self.args.hub_revision,
                    run_as_future=True,
                )
            )
        if busy and self.push_in_progress is not None:
            jobs = [*self.push_in_progress.jobs, *jobs]
        self.push_in_progress = PushInProgress(jobs)

    def _publish_settings(
        self, message: str | None, token: str | None, revision: str | None, private: bool | None
    ) -> dict[str, Any]:
        return {
            "message": message or "Training in progress",
            "token": token,
            "revision": revision or self.args.hub_revision,
            "private": self.args.hub_private_repo if private is None else private,
        }


def _publish_and_remove(folder: Path, repo_id: str, **settings: Any) -> PublishReport:
    try:
        return publish(folder, repo_id, **settings)
    except Exception as error:  # nobody looks at what the future raised, and training goes on
        logger.error(f"{repo_id} did not get {settings['message']!r}: {error}")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
