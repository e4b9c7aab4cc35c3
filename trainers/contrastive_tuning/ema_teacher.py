"""The EMA teacher of stage 2: an exponential moving average of the image encoder, towards which the image encoder is regularised."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from modeling_proclip import ProCLIPModel
from modeling_proclip.finite_weights import check_finite
from trainers.base.sharding import full_state, load_full_state, shard_like
from trainers.compute.precision import unit_length
from trainers.storage.files import write_safetensors


EMA_FILE = "ema_teacher.safetensors"


class EMATeacher:
    """E_I*: starts as a copy of the image encoder E_I (vision tower and projection) and is updated to
    E_I* = decay * E_I* + (1 - decay) * E_I after every optimizer step (ProCLIP, arXiv 2510.18795, method; the published code has none).

    It is in eval mode, has no gradient, and is no part of the model: its weights are a file of their own in a checkpoint.

    Args:
        model: whose image encoder is copied as it is now.
        decay: between 0 (the teacher equals the student) and 1 (the teacher never changes).
    """

    def __init__(self, model: ProCLIPModel, decay: float):
        # Buffers are copied, not averaged: averaging would round integer ones such as position ids.
        self.averaged = AveragedModel(
            _image_encoder(model), multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=False
        )
        # At 0 the first update would copy the student after its first step, and the start would be lost.
        self.averaged.n_averaged.fill_(1)
        self.averaged.eval().requires_grad_(False)

    def shard(self, model: ProCLIPModel) -> None:
        """Shard the average over the processes if `model` is."""
        shard_like(self.averaged.module, _image_encoder(model))

    @torch.no_grad()
    def update(self, model: ProCLIPModel) -> None:
        """Update the average with the image encoder of `model`."""
        self.averaged.update_parameters(_image_encoder(model))

    @torch.no_grad()
    def embed(self, **images: torch.Tensor) -> torch.Tensor:
        """v* `(batch_size, projection_dim)`, float32, of unit length, of what the image encoder takes, such as `pixel_values`."""
        encoder = self.averaged.module
        pooled = encoder["vision_model"](**images, return_dict=True).pooler_output
        return unit_length(encoder["visual_projection"](pooled))

    def save(self, folder: str | Path, should_write: bool = True) -> None:
        """Write `ema_teacher.safetensors` into `folder`, as a whole or not at all. All processes have to call it, one of them with `should_write`."""
        state = {name: tensor.contiguous() for name, tensor in full_state(self.averaged).items()}
        if not should_write:
            return
        check_finite(state, f"{Path(folder) / EMA_FILE} was not written")
        write_safetensors(Path(folder) / EMA_FILE, state, {"format": "pt"})

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote, on any number of processes. FileNotFoundError names the remedy if it is not in `folder`."""
        file = Path(folder) / EMA_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing, so the EMA teacher cannot be restored: resume from a checkpoint that method='proclip' wrote, or start a "
                "new run from these weights (ProCLIPModel.from_pretrained)"
            )
        load_full_state(self.averaged, load_file(file))


def _image_encoder(model: ProCLIPModel) -> nn.ModuleDict:
    return nn.ModuleDict({"vision_model": model.vision_model, "visual_projection": model.visual_projection})
