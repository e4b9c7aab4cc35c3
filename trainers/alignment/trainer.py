"""What stages 1 and 2 share: the loss of a batch with or without cached gradients, evaluation, what is logged, and what the card says."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from hub_cards import adapter_card, model_card
from modeling_proclip import ProCLIPConfig, ProCLIPModel
from trainers.base.finite import WithTexts
from trainers.base.gradient_caching import cached_backward
from trainers.base.micro_batches import MicroBatches
from trainers.base.replaced import replaced
from trainers.base.sharding import uses_fsdp
from trainers.base.streams import evaluation_loader
from trainers.base.trainer import StageTrainer
from trainers.base.training_record import training_record
from trainers.compute.precision import unit_length
from trainers.data.captions import DrawnCaptions
from trainers.data.epochs import SetEpoch
from trainers.data.pair_stream import PairStream
from trainers.data.stream_evaluation import REAL_ROWS
from trainers.data.stream_loader import StreamLoader

from .checks import check_store, check_texts, proclip_of, train_only
from .config import AlignmentConfig
from .input_statistics import set_input_statistics
from .store_identity import check_made_by_llm, text_encoder_of


logger = logging.getLogger(__name__)


class AlignmentTrainer(StageTrainer):
    """The part of a stage's trainer that is not its loss.

    - Only `trained` parameters of the model are trained; all others are frozen.
    - Captions and order of the rows depend on seed and epoch only; `train_dataset` may be a [`PairStream`], for which `max_steps` counts.
    - An adapter that standardises its input and has no statistics yet gets those of the text store.
    - Checkpoints leave the LLM out, which takes no part.
    - With `gradient_caching_batch_size` a batch stays in the host's memory and goes through the model one micro-batch at a time; the
      gradients are those of the whole batch.
    - With `matryoshka_dims` the first dimensions of the embeddings are trained as embeddings by themselves.
    - With `dataloader_drop_last=False` the last batch is smaller, on several processes too: what fills it up there does not count.
    - The loss's parts are logged beside the loss, averaged over steps and processes as it is, and the samples per second.
    - Settings, steps and losses of the stage are kept in the model's configuration, and its card is rendered from them.
    - Checkpoints, resuming, publishing and numbers that are not finite: see [`StageTrainer`].
    """

    stage: str  # its name, on the card
    data_collator: Any
    evaluates_streams = True

    def embed(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The embeddings `(batch_size, projection_dim)` that are trained, of unit length, by the wrapped `model`."""
        raise NotImplementedError

    def embed_frozen(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The embeddings `(batch_size, projection_dim)` that they are compared with and that are not trained."""
        raise NotImplementedError

    def loss_of(
        self, embeds: tuple[torch.Tensor, ...], frozen: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This process's share of the loss `()` of the joined batch, and its parts `()` to log. The mean of the shares over the processes is that
        loss.

        Args:
            embeds, frozen: `(batch_size, dim)`, unit length: what `embed` and `embed_frozen` gave, or a prefix of it.
        """
        raise NotImplementedError

    def __init__(
        self,
        model: ProCLIPModel,
        args: AlignmentConfig,
        train_dataset: Any,
        eval_dataset: Any,
        *,
        text_store: Any,
        trained: Iterable[nn.Parameter],
        **kwargs: Any,
    ):
        for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} would not be called: the stage has a loss of its own, and makes no predictions for single rows. Measure anything "
                    "else in a TrainerCallback's on_evaluate, with trainers.evaluation."
                )
        train_only(model, trained)
        self.rows: DrawnCaptions | PairStream = (
            train_dataset if isinstance(train_dataset, PairStream) else DrawnCaptions(train_dataset, args.seed)
        )
        self._parts: dict[str, dict[str, list[torch.Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._joined_rows = 0  # of the batch at hand, of all processes
        # In an evaluation on a stream: how many rows each process has of the current batch; and for each batch its loss and rows, of all processes.
        self._rows_of_stream: list[int] | None = None
        self._losses_of_stream: list[tuple[float, int]] = []
        super().__init__(model=model, args=args, train_dataset=self.rows, eval_dataset=eval_dataset, **kwargs)
        self._prefixes = self._shorter_dims(proclip_of(model).config)
        self._earlier_stages = model.config.training or []
        self._check_sizes()
        hidden_size = model.config.text_config.hidden_size
        check_made_by_llm("text_store", text_store, proclip_of(model), self.processing_class)
        self._text_encoder = text_encoder_of(text_store)
        self.check_store("text_store", text_store, hidden_size, "build it with this model's LLM, by `proclip embed`.")
        set_input_statistics(model, text_store)
        # Each batch's loss is a mean, which Trainer divides by the number of accumulated batches, or a sum, which it must not.
        self.loss_is_scaled_for_ga = args.reduction == "sum"
        if isinstance(self.rows, DrawnCaptions):
            self.add_callback(SetEpoch(self.rows))
        self._speed = _Speed()
        self.add_callback(self._speed)

    def check_store(self, name: str, store: Any, size: int, remedy: str, reader: str = "text") -> None:
        """Raises KeyError if captions are missing in `store`, ValueError if its embeddings are not of `size`; says the `remedy`."""
        check_store(name, store, size, self.rows, remedy, reader)
        rows = self.rows.rows if isinstance(self.rows, DrawnCaptions) else self.rows
        check_texts(name, store, rows, reader, progress=self.is_world_process_zero())
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for dataset in evaluated.values():
            check_texts(f"{name}, for eval_dataset", store, dataset, reader, progress=self.is_world_process_zero())

    def _check_sizes(self) -> None:
        """A dataset shorter than one batch of all processes would, with its last batch dropped, be empty."""
        args = self.args
        needed = args.train_batch_size * args.world_size
        if args.dataloader_drop_last and has_length(self.train_dataset) and len(self.train_dataset) < needed:
            raise ValueError(
                f"train_dataset has {len(self.train_dataset)} rows, fewer than one batch of {needed} over all processes: lower "
                "per_device_train_batch_size."
            )

    def _shorter_dims(self, config: ProCLIPConfig) -> list[int]:
        """The `matryoshka_dims` below the whole size, which counts anyway. Raises ValueError if one is above it."""
        dims = self.args.matryoshka_dims or []
        if dims and max(dims) > config.projection_dim:
            raise ValueError(
                f"matryoshka_dims={dims}, but this model's embeddings have {config.projection_dim} dimensions: leave out what is larger."
            )
        if config.matryoshka_dims and not dims:
            logger.warning(
                f"This model was trained for embeddings of {config.matryoshka_dims} dimensions too, and without matryoshka_dims this stage is "
                "not: its checkpoints name no such sizes."
            )
        return [dim for dim in dims if dim < config.projection_dim]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As Trainer, for matrices only: logit scale and class embedding do not decay, as in the published code."""
        matrices = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
        return [name for name in super().get_decay_parameter_names(model) if name in matrices]

    @contextmanager
    def only_what_is_saved(self) -> Iterator[None]:
        """Without the LLM, which takes no part: checkpoints are lean, and DDP has less to broadcast."""
        model = proclip_of(self.model)
        text_model, model.text_model = model.text_model, None
        try:
            yield
        finally:
            model.text_model = text_model

    def after_training(self) -> None:
        """Record the stage."""
        self._record_training(finished=True)

    def _record_training(self, finished: bool) -> None:
        """Write into the model's configuration what its card says of this stage."""
        if self.state.global_step:
            record = training_record(self, self.stage, self.rows, finished)
            if self._text_encoder is not None:
                record["text_encoder"] = self._text_encoder
            self.model.config.training = [*self._earlier_stages, record]
            proclip_of(self.model).config.matryoshka_dims = self.args.matryoshka_dims

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._record_training(finished=not self.is_in_train)
        super()._save(output_dir, state_dict)

    def create_model_card(self, **kwargs: Any) -> None:
        """Write `README.md` to `output_dir`, from what was saved there: [`~hub_cards.model_card`], or [`~hub_cards.adapter_card`] of PEFT adapters, with its
        arguments, such as `license` and `datasets`, and `model_name`.
        """
        if self.is_world_process_zero():
            model_name = kwargs.pop("model_name", None)
            kwargs.setdefault("repo_id", self.hub_model_id or model_name)
            if isinstance(self.model, ProCLIPModel):
                kwargs.setdefault("remote_code", self.hub_model_id is not None or None)  # publishing adds the code
                card = model_card(self.args.output_dir, **kwargs)
            else:
                card = adapter_card(self.args.output_dir, **kwargs)
            card.save(Path(self.args.output_dir) / "README.md")

    def get_train_dataloader(self) -> DataLoader | StreamLoader:
        """As in every stage; with gradient caching its batches stay in the host's memory."""
        placement = self.accelerator.device_placement and self.args.gradient_caching_batch_size is None
        with replaced(self.accelerator, device_placement=placement):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As Trainer, of all rows: `dataloader_drop_last` is for training. Of a stream, see [`EvaluationBatches`]."""
        collator = WithTexts(self.data_collator, "text")
        evaluated = self.eval_dataset if eval_dataset is None else eval_dataset
        evaluated = self.eval_dataset[evaluated] if isinstance(evaluated, str) else evaluated
        if isinstance(evaluated, PairStream):
            return evaluation_loader(evaluated, self.args, collator)
        with replaced(self.args, dataloader_drop_last=False), replaced(self, data_collator=collator):
            return super().get_eval_dataloader(eval_dataset)

    def _real_rows(self, rows: int) -> int:
        """How many of this process's `rows` are not repeated; sets `_joined_rows` to the number over all processes. accelerate fills up a last
        batch that is not dropped with rows from the beginning, so that every process has equally many.
        """
        if self._rows_of_stream is not None:
            self._joined_rows = sum(self._rows_of_stream)
            return self._rows_of_stream[self.args.process_index]
        loaders, world_size = self.accelerator.gradient_state, self.args.world_size
        self._joined_rows = rows * world_size
        dropped = self.model.training and self.args.dataloader_drop_last
        if world_size == 1 or dropped or not loaders.in_dataloader or not loaders.end_of_dataloader:
            return rows
        # Not accelerate's `remainder`, which is unset after resuming in the middle of an epoch.
        self._joined_rows = len(loaders.active_dataloader.dataset) % self._joined_rows or self._joined_rows
        return min(max(self._joined_rows - self.args.process_index * rows, 0), rows)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The loss `()` of a batch, and with `return_outputs` the embeddings of `embed` and `embed_frozen`."""
        frozen, embeds = self.embed_frozen(model, inputs), self.embed(model, inputs)
        real = self._real_rows(len(embeds[0]))
        embeds, frozen = tuple(side[:real] for side in embeds), tuple(side[:real] for side in frozen)
        loss = self._nested_loss(embeds, frozen)
        return (loss, (*embeds, *frozen)) if return_outputs else loss

    def loss_and_gradients(
        self, model: nn.Module, batch: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As in every stage; with gradient caching by [`cached_backward`]."""
        size = self.args.gradient_caching_batch_size
        rows = len(next(iter(batch.values())))
        if size is None or rows <= size:
            return super().loss_and_gradients(model, batch, num_items_in_batch)
        model.train()
        parts = MicroBatches(batch, size, self.accelerator.device)
        with torch.no_grad(), self.accelerator.autocast():
            of_parts = [self.embed_frozen(model, part) for part in parts]
        real = self._real_rows(rows)
        frozen = tuple(torch.cat(side)[:real] for side in zip(*of_parts, strict=True))
        return cached_backward(
            lambda part: self.embed(model, part),
            parts,
            lambda *embeds: self._nested_loss(tuple(side[:real] for side in embeds), frozen),
            accelerator=self.accelerator,
            model=model,
        )

    def _nested_loss(self, embeds: tuple[torch.Tensor, ...], frozen: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """`loss_of` of the whole embeddings, plus that of each prefix of `matryoshka_dims`, brought to unit length; keeps the parts for the log."""
        loss, parts = self.loss_of(embeds, frozen)
        for dim in self._prefixes:
            prefixes = (tuple(unit_length(side[:, :dim]) for side in sides) for sides in (embeds, frozen))
            parts[f"prefix_{dim}_loss"], _ = self.loss_of(*prefixes)
            loss = loss + parts[f"prefix_{dim}_loss"]
        self.record(**parts)
        return loss

    def evaluation_loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of an evaluation batch, the same on all processes; 0, which does not count, if all rows of a stream's batch are broken."""
        real_rows = batch.pop(REAL_ROWS, None)
        counts = None if real_rows is None else self.accelerator.gather(real_rows[None]).tolist()
        if counts is not None and not any(counts):
            return torch.zeros((), device=self.accelerator.device)
        with replaced(self, _rows_of_stream=counts):
            loss = self.accelerator.reduce(self.evaluate_batch(model, batch).detach(), reduction="mean")
        if counts is not None:
            self._losses_of_stream.append((loss.item(), sum(counts)))
        return loss

    def evaluate_batch(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss `()` of an evaluation batch; a stage may keep more of it for `evaluation_metrics`."""
        return self.compute_loss(model, batch)

    def evaluation_metrics(self) -> dict[str, float]:
        """Metrics of an evaluation besides the loss; called once at its end, on all processes."""
        return self._mean_parts("eval")

    def record(self, **parts: torch.Tensor) -> None:
        """Keep parts `()` of this batch's loss for the next log."""
        mode = "train" if self.model.training else "eval"
        # As Trainer weights the losses: by steps in training, by rows in evaluation.
        weight = 1 if self.model.training else self._joined_rows
        for name, value in parts.items():
            self._parts[mode][name].append(
                torch.stack([value.detach().float() * weight, value.new_tensor(weight).float()])
            )

    def _mean_parts(self, mode: str) -> dict[str, float]:
        if not self._parts[mode]:
            return {}
        sums = torch.stack([torch.stack(values).sum(0) for values in self._parts[mode].values()])
        means = self.accelerator.reduce(sums[:, 0] / sums[:, 1], reduction="mean").tolist()
        names = list(self._parts[mode])
        self._parts[mode].clear()
        return dict(zip(names, means, strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer, with the parts of the training loss and the samples per second since the last log."""
        if "loss" in logs:
            logs.update(self._mean_parts("train"))
            args = self.args
            rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            logs["samples_per_second"] = round(rows * self._speed.steps_per_second(self.state.global_step), 3)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As Trainer, with `evaluation_metrics` among the metrics."""
        self._losses_of_stream = []
        if uses_fsdp(self.accelerator) and not isinstance(self.model, FSDPModule):
            raise ValueError(
                "under FSDP the model is sharded when its training begins, and cannot be evaluated before: call train() first, with eval_on_start=True if the "
                "model is to be evaluated before the first step."
            )
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._losses_of_stream:  # Trainer weights batches alike where it cannot know how many rows they have
            num_rows = sum(rows for _, rows in self._losses_of_stream)
            output = output._replace(num_samples=num_rows)
            output.metrics[f"{metric_key_prefix}_loss"] = (
                sum(loss * rows for loss, rows in self._losses_of_stream) / num_rows
            )
        output.metrics.update({f"{metric_key_prefix}_{name}": v for name, v in self.evaluation_metrics().items()})
        return output


class _Speed(TrainerCallback):
    """Steps per second since the last log, without the time of evaluation and saving."""

    def __init__(self):
        self._start = self._pause = 0.0
        self._step = 0

    def steps_per_second(self, step: int) -> float:
        """Steps per second up to `step`, since the last call."""
        now = time.perf_counter()
        speed = (step - self._step) / (now - self._start)
        self._start, self._step = now, step
        return speed

    def on_train_begin(self, args, state, control, **kwargs):
        self._start, self._step = time.perf_counter(), state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        self._pause = time.perf_counter()

    def on_evaluate(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self._start += now - max(self._start, self._pause)
        self._pause = now

    def on_save(self, args, state, control, **kwargs):
        self.on_evaluate(args, state, control)
