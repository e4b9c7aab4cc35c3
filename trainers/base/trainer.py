"""What every stage's trainer does around its loss: a check for NaN and infinity, checkpoints, exact resuming, streams and publishing."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from trainers.data.pair_stream import PairStream
from trainers.data.stream_loader import StreamLoader

from . import checkpoints, sharding, zero
from .finite import MIN_LOSS_SCALE, TEXTS, WithTexts, all_finite, check_trained, explain, explain_to_all, finite_parts
from .publishing import Publisher
from .replaced import replaced
from .streams import StreamReader, check_evaluated_streams


class StageTrainer(Trainer):
    """A Trainer that

    - stops at the first loss or gradient that is NaN or infinite, and saves no such weights (gradients that overflow because of float16's
      loss scale are skipped by the scaler, as usual);
    - resumes from checkpoints that are complete and unchanged, see [`trainers.base.checkpoints`], to the bits of a run that was not
      interrupted; a finished run makes no further step;
    - trains to the same weights on one process, on several (DDP), with parameters that FSDP2 shards over them, see [`trainers.base.sharding`], and under
      DeepSpeed's ZeRO 1 and 2, see [`trainers.base.zero`];
    - takes a [`PairStream`] as `train_dataset`, for which `max_steps` says how long to train;
    - logs `data_wait`, the share of the time since the last log in which it waited for data: near 0 unless reading is the bottleneck;
    - publishes by `push_to_hub` and `hub_strategy` what `proclip publish` does: checkpoint, processor, code and card, private unless
      `hub_private_repo=False`. With `hub_strategy="checkpoint"` or `"all_checkpoints"` whole checkpoints are sent too, optimizer and random
      states (pickles) included.

    A stage overrides `loss_and_gradients` or `compute_loss`, and `save_state`, `load_state` and `after_optimizer_step` if it keeps more than
    model and optimizer.
    """

    text_column: str | None = "text"  # of the rows, for messages
    evaluates_streams = False  # whether `eval_dataset` may be a `PairStream`
    _num_kept: int | None = None  # checkpoints, while it trains

    def __init__(self, *args: Any, **kwargs: Any):
        self._publisher: Publisher | None = None
        self.push_in_progress: PushInProgress | None = None
        self._checkpoint: str | None = None  # that this run goes on from
        self._seconds_waiting = self._seconds_computing = 0.0  # since the last log
        super().__init__(*args, **kwargs)
        sharding.check_engine(self.accelerator)
        zero.check_zero(self.accelerator, self.args)
        self._scalars = sharding.scalars(self.model)
        check_evaluated_streams(self.eval_dataset, are_read=self.evaluates_streams)
        self._stream: StreamReader | None = None
        if isinstance(self.train_dataset, PairStream):
            self._stream = StreamReader(self.train_dataset, self.args)
            self.add_callback(self._stream)
        self.add_callback(_Hooks(self))

    # What a stage may override

    def loss_and_gradients(
        self, model: nn.Module, batch: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The loss `()` of a training batch, detached, with its gradients added to the parameters' `.grad`: by `compute_loss`."""
        return super().training_step(model, batch, num_items_in_batch)

    def evaluation_loss(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """The loss `()` of an evaluation batch: by `compute_loss`."""
        return self.compute_loss(model, batch)

    def before_training(self) -> None:
        """Called at the beginning of a training, when the model is on its device, and sharded if it will be."""

    def after_optimizer_step(self) -> None:
        """Called after every optimizer step, also one that was skipped because float16 gradients overflowed."""

    def after_training(self) -> None:
        """Called at the end of a training, when the last log is written."""

    def save_state(self, folder: Path) -> None:
        """Write into a checkpoint what the stage keeps besides model and optimizer; called on every process."""

    def load_state(self, folder: Path) -> None:
        """Read what `save_state` wrote."""

    @contextmanager
    def only_what_is_saved(self) -> Iterator[None]:
        """Within this context the model has no parts that take no part in training and are not saved."""
        yield

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint: a checkpoint's folder, or `True` for the last one in `output_dir` that is complete and unchanged: others are
                passed over with a warning.

        Raises:
            ValueError: If there is no such checkpoint, or the one that is named is damaged (names the file); if a loss, a gradient or a weight
                becomes NaN or infinite (names step, rows and parameters).
        """
        if resume_from_checkpoint:
            self._checkpoint = self._verified(resume_from_checkpoint)
        limit = self.args.save_total_limit
        # Transformers would skip a stream's rows by reading them, and count and delete folders that only begin like a checkpoint.
        changes = {"save_total_limit": None} | ({} if self._stream is None else {"ignore_data_skip": True})
        try:
            with (
                self.only_what_is_saved(),
                sharding.sharding_settings(self.accelerator, self.model),
                zero.zero_settings(self.accelerator, self._scalars),
                replaced(self.args, **changes),
                replaced(self, _num_kept=limit),
            ):
                output = super().train(self._checkpoint, **kwargs)
                check_trained(self.model, f"after step {self.state.global_step}")
        finally:
            self._checkpoint = None
        if limit == 1 and self.state.best_model_checkpoint is not None and self.args.should_save:
            checkpoints.rotate(self.args.output_dir, 1, [self.state.best_model_checkpoint])
        return output

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As Trainer, by `loss_and_gradients`. Raises ValueError if loss or gradients are not finite."""
        started = time.perf_counter()
        texts = inputs.pop(TEXTS, ())
        loss = self.loss_and_gradients(model, inputs, num_items_in_batch)
        accumulated = not self.accelerator.sync_gradients
        if not accumulated:
            sharding.average_scalar_gradients(self.accelerator, model)
        # float16's gradients are scaled, and infinite now and then: the scaler skips such a step.
        unchecked = accumulated or self.accelerator.scaler is not None
        gradients = [] if unchecked else zero.gradients_of(self.accelerator, model)
        loss_is_finite, gradients_are_finite = finite_parts(loss, gradients)
        if not (loss_is_finite and gradients_are_finite):
            why = self._why_not_finite(f"step {self.state.global_step + 1}", loss, model, inputs, texts)
            if not gradients_are_finite:  # those of all processes, so that all of them are here
                why = explain_to_all(why, inputs)
            raise ValueError(f"{why} The weights are still those before this step.")
        self._seconds_computing += time.perf_counter() - started  # the check has waited for the device
        return loss

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """As Trainer; under FSDP, autocast, which accelerate puts around the forward pass of every other model."""
        if sharding.uses_fsdp(self.accelerator):
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As Trainer; under FSDP with groups of their own for the parameters that stay whole."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        if sharding.uses_fsdp(self.accelerator):
            sharding.separate_scalars(optimizer, self.model)
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer; counts the seconds that it waits for the data workers."""
        started = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self._seconds_waiting += time.perf_counter() - started
        return batches

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The loss of an evaluation batch by `evaluation_loss`, and no predictions. Raises ValueError if it is not finite."""
        texts = inputs.pop(TEXTS, ())
        batch = send_to_device(inputs, self.accelerator.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.evaluation_loss(model, batch).detach()
        self.check_evaluated(loss, model, batch, texts)
        return loss, None, None

    def check_evaluated(self, loss: torch.Tensor, model: nn.Module, batch: Mapping[str, Any], texts: Any) -> None:
        """Raises ValueError if the loss `()` of an evaluation batch is not finite."""
        if not all_finite(loss, []):
            when = f"evaluation after step {self.state.global_step}"
            raise ValueError(self._why_not_finite(when, loss, model, batch, texts))

    def _why_not_finite(self, when: str, loss: torch.Tensor, model: nn.Module, batch: Any, texts: Any) -> str:
        return explain(
            when, loss.detach(), self.accelerator.unwrap_model(model), batch, texts, self.args.process_index
        )

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """As Trainer, with no epoch left for a run that was finished when its checkpoint was written: Trainer would make another step."""
        epochs, *others, max_steps = super().set_initial_training_values(args, dataloader)
        if self._checkpoint is not None and checkpoints.steps_of(self._checkpoint) >= max_steps:
            epochs = 0
        return epochs, *others, max_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer, with the share of time spent waiting for data, and without the mean loss of a run that made no step, which would be 0."""
        if (
            "train_loss" in logs
            and self._checkpoint
            and checkpoints.steps_of(self._checkpoint) == self.state.global_step
        ):
            del logs["train_loss"]
        seconds = self._seconds_waiting + self._seconds_computing
        if "loss" in logs and seconds:
            logs["data_wait"] = round(self._seconds_waiting / seconds, 4)
            self._seconds_waiting = self._seconds_computing = 0.0
        super().log(logs, start_time)

    def get_train_dataloader(self) -> DataLoader | StreamLoader:
        """As Trainer, or the batches of this process's share of a stream; with the captions of each row."""
        collator = self.data_collator if self.text_column is None else WithTexts(self.data_collator, self.text_column)
        if self._stream is not None:
            return self._stream.open(collator, self._checkpoint)
        with replaced(self, data_collator=collator):
            return super().get_train_dataloader()

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer, and whole where the model is sharded. Raises ValueError, on all processes, if a trained weight is NaN or infinite."""
        check_trained(self.model, f"{output_dir or self.args.output_dir} was not written")
        with sharding.saved_whole(self.accelerator), zero.scalars_as_saved(self.accelerator, self._scalars):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As Trainer, without the pickle of the arguments, which has the token of the Hub in it."""
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model, keep_torch_compile=False).save_pretrained(
            folder, state_dict=state_dict
        )
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer; the checkpoint is declared complete once all processes have written their files, then published, then counted."""
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        check_trained(self.model, f"{folder} was not written")
        if self.args.should_save:
            checkpoints.begin(folder)
        self.accelerator.wait_for_everyone()
        with replaced(self.args, push_to_hub=False):
            super()._save_checkpoint(model, trial)
        self.save_state(folder)
        if self._stream is not None:
            self._stream.save(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.complete(folder)
            self._publish_checkpoint(folder)
            checkpoints.rotate(self.args.output_dir, self._num_kept, [folder, self.state.best_model_checkpoint])

    def _verified(self, wanted: str | bool) -> str:
        """The checkpoint to resume from, verified by one process for all."""
        answer: list[str | ValueError | None] = [None]
        if self.is_world_process_zero():
            try:
                if wanted is True:
                    folder = checkpoints.last_complete_checkpoint(self.args.output_dir)
                else:
                    folder = str(wanted)
                    checkpoints.verify(folder)
                checkpoints.check_resumable(
                    folder,
                    num_processes=self.args.world_size,
                    batch_size=self.args.train_batch_size,
                    engine=sharding.engine_of(self.accelerator),
                )
                answer = [folder]
            except ValueError as error:
                answer = [error]
        (answer_of_first,) = broadcast_object_list(answer)
        if isinstance(answer_of_first, ValueError):
            raise answer_of_first
        return answer_of_first

    # Publishing

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As Trainer, private by default. ValueError if what would be sent later could not be, see [`Publisher`]."""
        if self.is_world_process_zero():
            self._publisher = Publisher(self.args, self.model, self.processing_class, token, private)
            self.hub_model_id = self._publisher.repo_id

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save model, processor and card to `output_dir`, and [`publish`] it.

        Args:
            commit_message, token, revision, private: As [`~transformers.Trainer.push_to_hub`].
            blocking: Whether to wait until it is sent.
            kwargs: Passed to `create_model_card`.

        Returns:
            [`PublishReport`], or a `Future` of it if `blocking=False`; `None` on other processes than the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self._publisher is None:
            self.init_hf_repo(token=token, private=private)
        with self.only_what_is_saved():
            self.save_model(_internal_call=True)
        if self._publisher is None:
            return None
        self.create_model_card(**kwargs)
        if self.push_in_progress is not None:
            self.push_in_progress.wait_until_done()
        return self._publisher.publish(
            self.args.output_dir, commit_message, blocking=blocking, token=token, revision=revision, private=private
        )

    def _publish_checkpoint(self, folder: Path) -> None:
        args = self.args
        if self._publisher is None or not args.push_to_hub or args.hub_strategy == HubStrategy.END:
            return
        unfinished = [] if self.push_in_progress is None else [j for j in self.push_in_progress.jobs if not j.done()]
        if unfinished and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        job = self._publisher.publish_checkpoint(folder, self.state.global_step)
        self.push_in_progress = PushInProgress([*unfinished, job])


class _Hooks(TrainerCallback):
    """Calls what a stage may override, where Trainer has no method of its own for it."""

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.before_training()
        if self.trainer._checkpoint is not None:
            self.trainer.load_state(Path(self.trainer._checkpoint))

    def on_optimizer_step(self, args, state, control, **kwargs):
        accelerator = self.trainer.accelerator
        scale = (
            accelerator.scaler.get_scale() if accelerator.optimizer_step_was_skipped and accelerator.scaler else 1.0
        )
        if scale < MIN_LOSS_SCALE:
            raise ValueError(
                f"step {state.global_step + 1}: float16's gradients overflow at any loss scale (it is {scale:.1e} now): train with bf16=True, "
                "or in float32."
            )
        self.trainer.after_optimizer_step()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.after_training()
