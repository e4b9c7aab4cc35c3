"""What a checkpoint records of a stage of its training, in its configuration, for the model card."""

import dataclasses
from typing import Any

from transformers import Trainer, TrainingArguments

from hub_cards.checkpoint_facts import is_hub_name
from hub_cards.measurements import shown_source
from hub_cards.scrubbing import scrub
from trainers.data.captions import DrawnCaptions
from trainers.data.pairs import PairRows, PairStream
from trainers.storage.versions import installed_versions


# The Trainer's own arguments that decide what is learned; all of a stage's own settings are recorded.
_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "bf16",
    "fp16",
    "seed",
)
_PACKAGES = ("proclip-transformers", "transformers", "torch")


def training_record(trainer: Trainer, stage: str, rows: DrawnCaptions | PairStream, finished: bool) -> dict[str, Any]:
    """What `trainer` has done so far with the training set `rows` and with which settings, as JSON: what `hub_cards.checkpoint_facts.StageRecord` reads.

    `finished` says whether the training has ended: with `load_best_model_at_end` the weights are those of an earlier step then. The settings are those of
    the stage that are set, and those of the Trainer that decide what is learned; "final" has the last logged losses.
    """
    args, state = trainer.args, trainer.state
    own = {field.name for field in dataclasses.fields(args)} - {
        field.name for field in dataclasses.fields(TrainingArguments)
    }
    settings = {name: getattr(args, name) for name in (*sorted(own), *_SETTINGS)}
    versions = installed_versions(_PACKAGES)
    best = finished and args.load_best_model_at_end and state.best_model_checkpoint is not None
    steps = state.best_global_step if best else state.global_step
    logged: dict[str, Any] = {"epoch": 0}
    for entry in state.log_history:
        if entry["step"] <= steps:
            logged.update(entry)
    return {
        "stage": stage,
        "trainer": type(trainer).__name__,
        "steps": steps,
        "num_epochs": round(logged["epoch"] if best else state.epoch or 0, 4),
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "num_processes": args.world_size,
        "num_rows": len(rows) if isinstance(rows, DrawnCaptions) else None,
        "data": _data(rows.rows if isinstance(rows, DrawnCaptions) else rows),
        "settings": scrub({name: _plain(value) for name, value in settings.items() if value is not None}),
        "final": {name: logged[name] for name in sorted(logged) if name == "loss" or name.endswith("_loss")},
        "versions": {package: versions.get(package, "not installed") for package in _PACKAGES},
    }


def _data(rows: Any) -> dict[str, Any] | None:
    if not isinstance(rows, (PairRows, PairStream)):
        return None
    source, name = rows.source, str(rows.source.source)
    place = {"source": name, "revision": source.revision, "on_hub": is_hub_name(name)}
    # A configuration is written for others: no folder of this machine, and no password of an address.
    return {**place, "source": shown_source(place), "split": source.split}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float)) else str(value)
