"""Memory that a stage needs on each device, from shapes alone: no weights are loaded, and nothing is computed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel, PreTrainedModel, TrainingArguments

from modeling_proclip import ProCLIPConfig, ProCLIPModel
from trainers.alignment.config import AlignmentConfig
from trainers.caption_contrastive.config import CaptionContrastiveConfig
from trainers.caption_contrastive.lora import add_lora
from trainers.contrastive_tuning.config import ContrastiveTuningConfig
from trainers.losses import block_elements

from .steps import RecipeSteps


Inputs = dict[str, torch.Tensor]

# Bytes that a loss and its gradient hold for each number in a block of rows against columns, and copies of the embeddings (measured on a
# CPU, where distances are float64; on a GPU a dozen float32 blocks come to the same).
STRUCTURE_LOSS, _CONTRASTIVE_LOSS = (50, 7), (16, 2)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device.

    Attributes:
        weights: of the model, of the EMA teacher, and of an LLM that embeds texts on the fly.
        gradients: of what is trained; on several devices with DDP twice, as DDP exchanges copies of them.
        optimizer: AdamW's two moments.
        activations: what the backward pass needs of the rows that a device takes at once, the inputs included. With gradient caching also the
            embeddings of the device's whole share of the batch.
        peak: the most at a time. Activations go as the gradients come, so the larger of the two counts; with gradient caching both.
        num_tokens: tokens of every text that was assumed, for the stage that trains the LLM.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    num_tokens: int | None = None


def plan_memory(steps: RecipeSteps, stage: str) -> MemoryPlan | None:
    """What `stage` takes on a device, on this number of processes and in the recipe's precision.

    FSDP and ZeRO divide weights, gradients and optimizer as the launch says; the layers that are gathered at the time come on top.

    Returns:
        None for `masked_next_token`, for image encoders whose input has no fixed size, and if a model's configuration cannot be read.
    """
    arguments, precision = steps.arguments[stage], getattr(torch, steps.precision)
    try:
        if isinstance(arguments, AlignmentConfig):
            return _plan_alignment(steps, arguments, precision)
        if isinstance(arguments, CaptionContrastiveConfig):
            text, revision = steps.recipe.model.place_of("text")
            config = AutoConfig.from_pretrained(text, revision=revision).get_text_config()
            with torch.device("meta"):
                llm = AutoModel.from_config(config, dtype=precision)
            return memory_of_llm(llm, arguments, arguments.max_length or steps.recipe.model.max_length, precision)
    except OSError:
        pass
    return None


def _plan_alignment(steps: RecipeSteps, arguments: AlignmentConfig, precision: torch.dtype) -> MemoryPlan | None:
    model = _untrained_pair(steps)
    on_the_fly = 0
    if steps.samples("llm"):
        with torch.device("meta"):
            on_the_fly = _bytes(AutoModel.from_config(model.config.text_config, dtype=precision).parameters())
    return memory_of(model, arguments, precision, on_the_fly)


def memory_of(
    model: ProCLIPModel, arguments: AlignmentConfig, precision: torch.dtype, other_weights: int = 0
) -> MemoryPlan | None:
    """[`plan_memory`] of stage 1 or 2 for a `model` on the meta device, without its LLM; `other_weights` are bytes that lie beside it."""
    image_size = getattr(model.config.vision_config, "image_size", None)
    if not isinstance(image_size, int):
        return None
    image_encoder = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    trained, num_trained, num_frozen, teacher = [*model.text_adapter.parameters()], 1, 1, 0
    tunes_images = False
    if isinstance(arguments, ContrastiveTuningConfig):
        trained.append(model.logit_scale)
        tunes_images = not arguments.freeze_vision
        has_teacher = bool(arguments.lambda_ins or arguments.lambda_struct)
        teacher = _bytes(image_encoder) if has_teacher else 0
        if tunes_images:
            trained += image_encoder
            num_trained, num_frozen = 2, int(has_teacher)
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    channels = getattr(model.config.vision_config, "num_channels", 3)

    def inputs(rows: int) -> Inputs:
        llm_embeds = torch.empty(rows, model.config.text_config.hidden_size)
        if not tunes_images:
            return {"llm_embeds": llm_embeds}
        return {"llm_embeds": llm_embeds, "pixel_values": torch.empty(rows, channels, image_size, image_size)}

    share = arguments.per_device_train_batch_size
    at_once = min(arguments.gradient_caching_batch_size or share, share)
    num_layers = getattr(model.config.vision_config, "num_hidden_layers", 1) if tunes_images else 1
    side = share * model.config.projection_dim * 4
    kept = _activations(model, inputs, at_once, arguments, num_layers, precision)
    return _plan(
        model,
        arguments,
        other_weights=teacher + other_weights,
        activations=kept + _waiting_inputs(inputs, share, at_once, arguments),
        embeddings=(num_trained + num_frozen) * side,
        loss=_bytes_of_loss(share, side, arguments),
        cached=at_once < share,
    )


def memory_of_llm(
    llm: PreTrainedModel, arguments: CaptionContrastiveConfig, num_tokens: int, precision: torch.dtype
) -> MemoryPlan:
    """[`plan_memory`] of stage 0 for an LLM on the meta device, if every text has `num_tokens` tokens and no row has hard negatives."""
    llm.config.is_causal = False
    with torch.device("meta"):
        model = add_lora(llm, arguments)

    def inputs(texts: int) -> Inputs:
        token_ids = torch.zeros(texts, num_tokens, dtype=torch.long)
        # What the processor gives: ids, the mask of attention, and that of pooling.
        return {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}

    share = 2 * arguments.per_device_train_batch_size
    cached = arguments.gradient_caching_batch_size is not None
    at_once = min(arguments.gradient_caching_batch_size or share, share)
    if cached and arguments.micro_batch_tokens:
        at_once = min(at_once, max(arguments.micro_batch_tokens // num_tokens, 1))
    num_layers = arguments.lora_num_layers or llm.config.num_hidden_layers
    side = share * llm.config.hidden_size * 4
    kept = _activations(model, inputs, at_once, arguments, num_layers, precision)
    columns = arguments.per_device_train_batch_size * arguments.world_size
    return _plan(
        model,
        arguments,
        other_weights=0,
        activations=kept + _waiting_inputs(inputs, share, at_once, arguments),
        embeddings=side,
        # Cosines, masked logits, their softmax and gradient.
        loss=4 * arguments.per_device_train_batch_size * columns * 4,
        cached=cached,
        num_tokens=num_tokens,
    )


def _plan(
    model: nn.Module,
    arguments: TrainingArguments,
    *,
    other_weights: int,
    activations: int,
    embeddings: int,
    loss: int,
    cached: bool,
    num_tokens: int | None = None,
) -> MemoryPlan:
    """The plan from `activations` of the rows that a device takes at once, its share's `embeddings`, and what the `loss` takes."""
    of_weights, of_gradients, of_optimizer = _divisors(arguments)
    trained = _bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    weights = (_bytes([*model.parameters(), *model.buffers()]) + other_weights) // of_weights
    gradients, optimizer = trained // of_gradients, 2 * trained // of_optimizer
    buckets = gradients if arguments.world_size > 1 and of_optimizer == 1 else 0
    if cached:
        # Embeddings and their gradients first go through the loss, before a micro-batch's activations come.
        activations = max(activations + embeddings, 2 * embeddings + loss)
        moving = gradients + activations
    else:
        activations += loss
        moving = max(gradients, activations)
    return MemoryPlan(
        weights, gradients + buckets, optimizer, activations, weights + optimizer + buckets + moving, num_tokens
    )


def _divisors(arguments: TrainingArguments) -> tuple[int, int, int]:
    """Among how many devices weights, gradients and optimizer are divided."""
    devices = arguments.world_size
    if arguments.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return devices, devices, devices
    if arguments.deepspeed_plugin is not None:
        stage = arguments.deepspeed_plugin.zero_stage
        return devices if stage >= 3 else 1, devices if stage >= 2 else 1, devices if stage >= 1 else 1
    return 1, 1, 1


def _activations(
    model: nn.Module,
    inputs: Callable[[int], Inputs],
    rows: int,
    arguments: TrainingArguments,
    num_layers: int,
    precision: torch.dtype,
) -> int:
    """What the backward pass needs of `rows` rows; with checkpointing all layers' inputs, and all that one layer keeps once it is computed again."""
    with FakeTensorMode():
        _leave_meta_device(model)
        model.train()
        kept = _saved_bytes(model, inputs(rows), precision)
        if arguments.gradient_checkpointing:
            model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
            # A quarter more for the gradients within a layer, which are little beside all layers' activations, but not beside one's.
            of_layer = kept // num_layers * 5 // 4
            kept = min(kept, _saved_bytes(model, inputs(rows), precision) + of_layer)
        return kept


def _waiting_inputs(inputs: Callable[[int], Inputs], share: int, at_once: int, arguments: TrainingArguments) -> int:
    """Inputs beside those that are trained on: on a GPU the next micro-batch; on a CPU the rest of this batch and the next one."""
    with torch.device("meta"):
        of_row = _bytes(inputs(1).values())
    if arguments.device.type == "cpu":
        return (2 * share - at_once) * of_row
    return at_once * of_row if at_once < share else 0


def _bytes_of_loss(share: int, side: int, arguments: AlignmentConfig) -> int:
    """The block that the loss computes at a time, its copies of a `side` of the embeddings, and the sides that are gathered with their gradients."""
    columns = share * arguments.world_size
    block = min(block_elements(arguments.device), share * columns)
    of_number, copies = STRUCTURE_LOSS if arguments.lambda_struct else _CONTRASTIVE_LOSS
    gathered = 4 * side * arguments.world_size if arguments.world_size > 1 else 0
    return of_number * block + copies * side + gathered


def _untrained_pair(steps: RecipeSteps) -> ProCLIPModel:
    """The model of stages 1 and 2, without its LLM, on the meta device, from configurations."""
    settings = steps.recipe.model
    vision_name, vision_revision = settings.place_of("vision")
    text_name, text_revision = settings.place_of("text")
    vision_config = AutoConfig.from_pretrained(vision_name, revision=vision_revision)
    text_config = AutoConfig.from_pretrained(text_name, revision=text_revision).get_text_config()
    attention = {} if settings.attn_implementation is None else {"attn_implementation": settings.attn_implementation}
    with torch.device("meta"):
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
        config = ProCLIPConfig(vision_config=tower_config, text_config=text_config, **values, **attention)
        return ProCLIPModel(
            config, load_text_model=False, dtypes={"vision_config": torch.float32, "text_config": torch.float32}
        )


def _leave_meta_device(model: nn.Module) -> None:
    """Within a `FakeTensorMode`: give the tensors of `model` the CPU as their device, whose operators keep what they keep in earnest. Models are made on
    the meta device, as some initialise their weights by values, which fake tensors have none of.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                on_cpu = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                module._parameters[name] = nn.Parameter(on_cpu, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _saved_bytes(model: nn.Module, inputs: Inputs, precision: torch.dtype) -> int:
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
