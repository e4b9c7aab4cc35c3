"""What stages 1 and 2 share: the loss of a batch with or without cached gradients, evaluation, what is logged, and what the card says."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from hub_cards import adapter_card, model_card
from modeling_proclip import ProCLIPConfig, ProCLIPModel
from trainers.base.finite import WithTexts

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
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
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
