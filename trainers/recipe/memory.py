"""Bytes that stages 1 and 2 take on a device, from shapes alone: no weight is loaded, and nothing is computed."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel, PreTrainedModel

from modeling_proclip import ProCLIPConfig, ProCLIPModel
from trainers.alignment.config import AlignmentConfig
from trainers.contrastive_tuning.config import ContrastiveTuningConfig

from .steps import RecipeSteps


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device.

    Attributes:
        weights: of the model, of the EMA teacher, and of an LLM that embeds texts on the fly.
        gradients: of what is trained.
        optimizer: AdamW's two moments.
        activations: what the backward pass needs of the rows that a device takes at once, the rows themselves included.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def peak(self) -> int:
        """The most at a time. Activations go as the gradients come, so the larger of the two counts."""
        return self.weights + self.optimizer + max(self.gradients, self.activations)


def plan_memory(steps: RecipeSteps, stage: str, rows: int) -> MemoryPlan | None:
    """What `stage` takes on a device that takes `rows` rows at once, in the recipe's precision.

    Returns:
        None for a stage that tunes the LLM, for image encoders whose input has no fixed size, and if a model's configuration cannot be read.
    """
    arguments = steps.arguments[stage]
    if not isinstance(arguments, AlignmentConfig):
        return None
    with FakeTensorMode():
        try:
            model = _untrained_pair(steps)
        except OSError:
            return None
        plan = memory_of(model, arguments, rows, getattr(torch, steps.precision))
        if plan is None or not steps.samples("llm"):
            return plan
        llm = AutoModel.from_config(model.config.text_config, dtype=getattr(torch, steps.precision))
        return MemoryPlan(plan.weights + _bytes(llm.parameters()), plan.gradients, plan.optimizer, plan.activations)


def memory_of(model: ProCLIPModel, arguments: AlignmentConfig, rows: int, precision: torch.dtype) -> MemoryPlan | None:
    """As [`plan_memory`], of a model without its LLM that was made within a `FakeTensorMode`, which has to be active."""
    image_size = getattr(model.config.vision_config, "image_size", None)
    if not isinstance(image_size, int):
        return None
    tuning = isinstance(arguments, ContrastiveTuningConfig)
    image_encoder = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    trained = [*model.text_adapter.parameters()]
    inputs = {"llm_embeds": torch.empty(rows, model.config.text_config.hidden_size)}
    teacher = 0
    if isinstance(arguments, ContrastiveTuningConfig):
        trained.append(model.logit_scale)
        teacher = _bytes(image_encoder) if arguments.lambda_ins or arguments.lambda_struct else 0
        if not arguments.freeze_vision:
            trained += image_encoder
            channels = getattr(model.config.vision_config, "num_channels", 3)
            inputs["pixel_values"] = torch.empty(rows, channels, image_size, image_size)
    model.requires_grad_(False).train()
    for parameter in trained:
        parameter.requires_grad_(True)
    activations = _saved_bytes(model, inputs, precision)
    if tuning and arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
        # All layers' inputs, and all that one layer keeps once it is computed again.
        inputs_of_layers = _saved_bytes(model, inputs, precision)
        of_one_layer = activations // model.config.vision_config.num_hidden_layers
        activations = min(activations, inputs_of_layers + of_one_layer)
    everything = [*model.parameters(), *model.buffers()]
    return MemoryPlan(_bytes(everything) + teacher, _bytes(trained), 2 * _bytes(trained), activations)


def _untrained_pair(steps: RecipeSteps) -> ProCLIPModel:
    """The model of stages 1 and 2, without its LLM, from configurations."""
    settings = steps.recipe.model
    vision_name, vision_revision = settings.place_of("vision")
    text_name, text_revision = steps.recipe.model.place_of("text")
    vision_config = AutoConfig.from_pretrained(vision_name, revision=vision_revision)
    attention = {} if settings.attn_implementation is None else {"attn_implementation": settings.attn_implementation}
    if isinstance(vision_config, ProCLIPConfig):
        tower_config, projection = vision_config.vision_config, vision_config.vision_projection
        size = vision_config.projection_dim
    else:
        vision: PreTrainedModel = AutoModel.from_config(vision_config)
        parts = dict(vision.named_children())
        tower_config, layer = parts.get("vision_model", vision).config, parts.get("visual_projection")
        projection = isinstance(layer, nn.Linear)
        size = layer.out_features if isinstance(layer, nn.Linear) else tower_config.hidden_size
    values: dict[str, Any] = {"projection_dim": size, "vision_projection": projection, **settings.config}
    text_config = AutoConfig.from_pretrained(text_name, revision=text_revision).get_text_config()
    config = ProCLIPConfig(vision_config=tower_config, text_config=text_config, **values, **attention)
    return ProCLIPModel(
        config, load_text_model=False, dtypes={"vision_config": torch.float32, "text_config": torch.float32}
    )


def _saved_bytes(model: ProCLIPModel, inputs: dict[str, torch.Tensor], precision: torch.dtype) -> int:
    """Bytes of the inputs and of all that autograd keeps of a forward pass, each storage once."""
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in inputs.values()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other gets its place
        return tensor

    half = precision != torch.float32
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", precision, half):
        model(**inputs)
    return sum(storage.nbytes() for storage in kept.values())


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
