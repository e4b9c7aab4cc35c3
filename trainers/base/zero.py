"""Training under DeepSpeed's ZeRO 1 and 2, through accelerate: the optimizer's state, and in stage 2 the gradients, are divided among the processes, and
every process holds all weights.

DeepSpeed's engine takes over what Trainer does elsewhere: `accelerator.backward` also clips, makes the optimizer's step (unless a gradient is not finite)
and clears the gradients, which are never in `.grad`. It trains its own copy of the weights, and accepts no parameter without dimensions.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments

from .distributed import world_size
from .replaced import replaced


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Whether `accelerator` trains by DeepSpeed."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def check_zero(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Raises ValueError for settings of DeepSpeed under which a training could not run, or would differ from the one that was asked for."""
    asked_for = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"  # by `accelerate launch`
    if asked_for and not (uses_deepspeed(accelerator) and accelerator.num_processes == world_size()):
        raise ValueError(
            "accelerate uses DeepSpeed only where it finds a GPU or the like, and there is none: start this training with "
            "recipes/accelerate/ddp.yaml in place of DeepSpeed's file."
        )
    if not uses_deepspeed(accelerator):
        return
    plugin = accelerator.state.deepspeed_plugin
    example = "recipes/accelerate/deepspeed_zero2.yaml is a file for accelerate launch that works"
    if plugin.zero_stage == 3:
        raise ValueError(
            "ZeRO 3 takes the weights apart after each forward pass, and the loss reads the logit scale there: use FSDP2, which shards weights too "
            f"(recipes/accelerate/fsdp2.yaml), or ZeRO 1 or 2 ({example})."
        )
    if plugin.zero_stage == 0:
        raise ValueError(f"zero_stage: 0 shares nothing out: use DDP, or set zero_stage to 1 or 2 ({example}).")
    if args.fp16:
        raise ValueError(
            "fp16=True is not supported under DeepSpeed, which scales losses itself: set bf16=True, or train in float32."
        )
    for name in {"optimizer", "scheduler"} & plugin.deepspeed_config.keys():
        raise ValueError(
            f"DeepSpeed's {name} would replace the trainer's: leave it out of its configuration ({example})."
        )
    if args.max_grad_norm and "gradient_clipping" not in plugin.deepspeed_config:
        raise ValueError(
            f'max_grad_norm={args.max_grad_norm} would be ignored: set gradient_clipping: "auto" in DeepSpeed\'s configuration ({example}).'
        )


@contextmanager
def zero_settings(accelerator: Accelerator, scalars: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within this context DeepSpeed can train parameters without dimensions, the `scalars`: they have one, of size 1. And it reads checkpoints without running
    code from them. Nothing changes without DeepSpeed.
    """
    if not uses_deepspeed(accelerator):
        yield
        return
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    config = accelerator.state.deepspeed_plugin.deepspeed_config
    if accelerator.mixed_precision == "bf16":
        # DeepSpeed's own bf16 rounds the weights. This computes in bfloat16 from float32 weights, and adds gradients in float32, as every other training does.
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    with _reshaped(scalars, (1,)), replaced(TorchCheckpointEngine, load=_load_weights_only):
        yield


def scalars_as_saved(accelerator: Accelerator, scalars: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    """A context in which the scalars have no dimensions, as in every file."""
    return _reshaped(scalars, ()) if uses_deepspeed(accelerator) else nullcontext()


def step_left_out(accelerator: Accelerator, model: nn.Module) -> AbstractContextManager[None]:
    """A context for all backward passes of a step but the last: `accelerator.backward` adds to the gradients, the processes do not exchange them (except under
    ZeRO 2, where no process keeps all of them), and DeepSpeed makes no step.
    """
    if not uses_deepspeed(accelerator):
        return accelerator.no_sync(model)
    return replaced(accelerator, sync_gradients=False)


def gradients_of(accelerator: Accelerator, model: nn.Module) -> list[torch.Tensor]:
    """The gradients of the wrapped `model`. DeepSpeed has already made the step and keeps only their norm `()`, which is infinite if it skipped the step
    because of them.
    """
    if uses_deepspeed(accelerator):
        return [torch.as_tensor(model.get_global_grad_norm())]
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@torch.no_grad()
def clamp_(accelerator: Accelerator, parameter: nn.Parameter, low: float, high: float) -> None:
    """`parameter.clamp_(low, high)`, also of the copy that DeepSpeed trains."""
    parameter.clamp_(low, high)
    if uses_deepspeed(accelerator):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, parameter)


@contextmanager
def _reshaped(parameters: Sequence[nn.Parameter], shape: tuple[int, ...]) -> Iterator[None]:
    before = [parameter.shape for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.reshape(shape)
    try:
        yield
    finally:
        for parameter, whole in zip(parameters, before, strict=True):
            parameter.data = parameter.data.reshape(whole)


def _load_weights_only(self: Any, path: str, map_location: Any = None) -> Any:
    """In place of DeepSpeed's own, which unpickles whatever the file names."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location=map_location, weights_only=True)
