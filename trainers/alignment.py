"""What both stages of ProCLIP's curriculum share: settings, the loss between student and teacher, exact resuming, and what is logged."""

import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from hub_cards import model_card
from modeling_proclip import ProCLIPModel

from .collators import DrawnCaptions
from .losses import global_instance_alignment_loss, global_structure_alignment_loss
from .training_record import training_record


logger = logging.getLogger(__name__)

# The file that Trainer writes last: a checkpoint with it is complete.
_STATE_FILE = "trainer_state.json"


@dataclass
class AlignmentConfig(TrainingArguments):
    """Fields and defaults that both stages share; see [`RepresentationInheritanceConfig`] and [`ContrastiveTuningConfig`]."""

    learning_rate: float = 1e-5
    lr_scheduler_type: str = "cosine"
    weight_decay: float = 0.05
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-6
    num_train_epochs: float = 4.0
    dataloader_drop_last: bool = True
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    data_seed: int | None = None

    reduction: str = "mean"
    structure_distance: str = "squared"
    lambda_ins: float | None = None
    lambda_struct: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.data_seed is None:
            # Else the order of the rows would come from whatever torch was seeded with last.
            self.data_seed = self.seed
        for name, choices in (("reduction", ("mean", "sum")), ("structure_distance", ("squared", "smooth_l1"))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}."
                )
        for name in ("lambda_ins", "lambda_struct"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would drop the captions, which the model's forward does not take: leave it False."
            )


class AlignmentTrainer(Trainer):
    """
    The part of a stage's trainer that is not its loss.

    - Only `trained` parameters of the model are trained; all others are frozen.
    - Captions and order of the rows depend on seed and epoch only.
    - An adapter that standardises its input and was not told how yet gets the statistics of the text store.
    - Checkpoints leave the LLM out, which takes no part; `train(resume_from_checkpoint=True)` goes on from the last *complete* one, to the
      same bits as a run that was not interrupted.
    - The loss's parts are logged beside the loss, averaged over steps and processes as it is.
    - Settings, steps and losses of the stage are kept in the model's configuration, and its card is rendered from them.
    """

    stage: str  # its name, on the card

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
        train_only(model, trained)
        self.rows = DrawnCaptions(train_dataset, args.seed)
        self._parts: dict[str, dict[str, list[torch.Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        super().__init__(model=model, args=args, train_dataset=self.rows, eval_dataset=eval_dataset, **kwargs)
        # Trainer sets it on every model. It is no key of ours, and a checkpoint that holds it would be refused.
        model.config.__dict__.pop("use_cache", None)
        self._earlier_stages = model.config.training or []
        self._check_sizes()
        hidden_size = model.config.text_config.hidden_size
        check_store(
            "text_store", text_store, hidden_size, self.rows, "build it with this model's LLM, by `proclip embed`."
        )
        set_input_statistics(model, text_store)
        # Each batch's loss is a mean, which Trainer divides by the number of accumulated batches, or a sum, which it must not.
        self.loss_is_scaled_for_ga = args.reduction == "sum"
        self.add_callback(_SetEpoch(self.rows))

    def _check_sizes(self) -> None:
        """A dataset shorter than one batch of all processes would, with its last batch dropped, be empty."""
        args = self.args
        eval_datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        sizes = [("train_dataset", self.train_dataset, args.train_batch_size, "per_device_train_batch_size")]
        sizes += [
            ("eval_dataset", data, args.eval_batch_size, "per_device_eval_batch_size")
            for data in eval_datasets.values()
        ]
        for name, dataset, batch_size, field in sizes:
            needed = batch_size * args.world_size
            if args.dataloader_drop_last and dataset is not None and len(dataset) < needed:
                raise ValueError(
                    f"{name} has {len(dataset)} rows, fewer than one batch of {needed} over all processes: lower {field}."
                )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As Trainer, without what is no matrix: logit scale and class embedding, as in the published code."""
        matrices = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
        return [name for name in super().get_decay_parameter_names(model) if name in matrices]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """
        As [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint: a checkpoint's folder, or `True` for the last complete one in `output_dir`: one that a killed process
                had not finished is passed over.

        Raises:
            ValueError: If there is no complete checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        # Without the LLM, which takes no part, checkpoints are lean and DDP has less to broadcast.
        model, text_model = self.model, self.model.text_model
        model.text_model = None
        try:
            output = super().train(resume_from_checkpoint, **kwargs)
            self._record_training()
            return output
        finally:
            model.text_model = text_model

    def _record_training(self) -> None:
        """Write into the model's configuration what its card says of this stage."""
        if self.state.global_step:
            self.model.config.training = [*self._earlier_stages, training_record(self, self.stage, len(self.rows))]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._record_training()
        super()._save(output_dir, state_dict)

    def create_model_card(self, **kwargs: Any) -> None:
        """
        Write `README.md` to `output_dir`, from what was saved there: [`~hub_cards.model_card`].

        Args:
            kwargs: Of that function, such as `license` and `datasets`. `model_name` is understood too.
        """
        if self.is_world_process_zero():
            model_name = kwargs.pop("model_name", None)
            kwargs.setdefault("repo_id", self.hub_model_id or model_name)
            model_card(self.args.output_dir, **kwargs).save(Path(self.args.output_dir) / "README.md")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            # One left by an earlier run in the same folder would make this checkpoint look complete while it is written.
            folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            (folder / _STATE_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Every process has written its file before the first one writes the last file of the checkpoint.
        self.accelerator.wait_for_everyone()

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The loss of an evaluation batch `()`, and no predictions: [`trainers.evaluation`] has the metrics."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def record(self, **parts: torch.Tensor) -> None:
        """Keep parts `()` of this batch's loss for the next log."""
        mode = "train" if self.model.training else "eval"
        for name, value in parts.items():
            self._parts[mode][name].append(value.detach().float())

    def _mean_parts(self, mode: str) -> dict[str, float]:
        if not self._parts[mode]:
            return {}
        means = torch.stack([torch.stack(values).mean() for values in self._parts[mode].values()])
        means = self.accelerator.reduce(means, reduction="mean").tolist()
        names = list(self._parts[mode])
        self._parts[mode].clear()
        return dict(zip(names, means, strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer, with the parts of the training loss since the last log."""
        if "loss" in logs:
            logs.update(self._mean_parts("train"))
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As Trainer, with the parts of the loss among the metrics."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{name}": v for name, v in self._mean_parts("eval").items()})
        return output


class _SetEpoch(TrainerCallback):
    # accelerate calls set_epoch of a dataset only where its sampler has none, and not on several processes.
    def __init__(self, rows: DrawnCaptions):
        self.rows = rows

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.rows.set_epoch(int(state.epoch or 0))


def unit(embeds: torch.Tensor) -> torch.Tensor:
    """`(batch_size, dim)` of any length and dtype to unit length, in float32: half precision would leave lengths of 1 +- 0.004."""
    return F.normalize(embeds.float(), dim=-1)


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, args: AlignmentConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    lambda_ins L_ins + lambda_struct L_struct over the joined batch of all processes (ProCLIP, arXiv 2510.18795, method): L_stage1 with the
    text embeddings, lambda L_reg of stage 2 with the image embeddings.

    Args:
        student, teacher: `(batch_size, projection_dim)`, unit length, this process's rows.

    Returns:
        The loss `()`, whose mean over the processes is that of the joined batch, and its parts without their weights. A part with weight 0
        is not computed.
    """
    loss, parts = student.new_zeros(()), {}
    if args.lambda_ins:
        parts["instance_loss"] = global_instance_alignment_loss(student, teacher, args.reduction)
        loss = loss + args.lambda_ins * parts["instance_loss"]
    if args.lambda_struct:
        parts["structure_loss"] = global_structure_alignment_loss(
            student, teacher, args.reduction, args.structure_distance
        )
        loss = loss + args.lambda_struct * parts["structure_loss"]
    return loss, parts


def train_only(model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
    """
    Freeze all of `model` but the `trained` parameters.

    Raises:
        ValueError: If one of these is in half precision, where steps as small as the learning rate's are lost to rounding.
    """
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} is to be trained but is {parameter.dtype}: the small steps of training would be lost to rounding. Load the model with "
                "dtype=torch.float32 (or dtype={'vision_config': torch.float32, 'text_config': ...}) or call .float() on it; bf16=True in "
                "the trainer's arguments computes in half precision all the same."
            )


def check_store(name: str, store: Any, size: int, rows: DrawnCaptions, remedy: str) -> None:
    """Look a caption of `rows` up. Raises KeyError if the store does not have it, ValueError if its embeddings are not of `size`."""
    found = store.lookup([rows[0]["text"]]).shape[1]
    if found != size:
        raise ValueError(f"{name} holds embeddings of size {found}, but this model needs {size}: {remedy}")


def set_input_statistics(model: ProCLIPModel, text_store: Any) -> None:
    """Give an adapter that standardises its input and was not told how yet the mean and deviation of the text store."""
    adapter = model.text_adapter
    if model.config.adapter_input_norm != "standardize" or adapter.input_mean.any() or (adapter.input_std != 1).any():
        return
    adapter.set_input_statistics(*text_store.statistics())
    logger.warning("The adapter's input statistics were unset; they are now those of the text store.")


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """
    The checkpoint of the most steps in `output_dir` that was written to its end.

    Raises:
        ValueError: If there is none.
    """
    steps = {int(folder.name.split("-")[1]): folder for folder in Path(output_dir).glob("checkpoint-[0-9]*")}
    for step in sorted(steps, reverse=True):
        try:
            TrainerState.load_from_json(str(steps[step] / _STATE_FILE))
        except (OSError, ValueError):
            logger.warning(f"{steps[step]} was not written to its end; looking for the one before it.")
        else:
            return str(steps[step])
    raise ValueError(f"{output_dir} holds no complete checkpoint to resume from: leave resume_from_checkpoint out.")
