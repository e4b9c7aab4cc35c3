"""Proof that an LLM reads a text in both directions, in every layer, and that the padding beside a text does not change it."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


ATTENTION_LAYERS = {"full_attention", "sliding_attention"}  # of `config.layer_types`
_NUM_TOKENS, _NUM_PADDING = 5, 3
# The batch that is run: a text, the same again (their difference is the arithmetic's own noise), with another last token, with other padding.
_TEXT, _AGAIN, _OTHER_END, _OTHER_PADDING = range(4)


@torch.no_grad()
def check_bidirectional(text_model: nn.Module) -> None:
    """Prove that every layer of `text_model` attends in both directions and to tokens only, and that positions do not count the padding.

    Some families ignore `config.is_causal = False` in some attention implementations, with or without padding. Hybrids mix attention with
    layers that only run forward. Learned positions count the padding on the left. So the model is tried as it was loaded, without padding
    and with: the first token that leaves a layer must move with the last one that enters it, and must not move with a padding token. Costs
    two forward passes over four texts of eight tokens, in eval mode.

    Raises:
        ValueError: Naming the family, the layer and the remedy, if a layer stays causal or attends to padding, if a text's states are others
            beside padding, or if the model does not run.
    """
    unknown = set(getattr(text_model.config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if unknown:
        raise ValueError(
            f"The text model {type(text_model).__name__} has layers of type {min(unknown)!r}, which do not attend in both directions to all of a "
            f"text: take an LLM whose layers are of {' and '.join(sorted(ATTENTION_LAYERS))} (Llama, Qwen2, Qwen3, Mistral, Gemma and Phi-3 are tested)."
        )
    was_training = {module: module.training for module in text_model.modules()}
    text_model.eval()
    try:
        alone, padded = (_check_layers(text_model, num_padding) for num_padding in (0, _NUM_PADDING))
    except (AttributeError, TypeError, LookupError) as error:
        raise ValueError(
            f"The text model {_describe(text_model)} does not run as an LLM of ProCLIP does, with and without a mask and without a cache "
            f"({type(error).__name__}: {error}). Take an LLM of another family (Llama, Qwen2, Qwen3, Mistral, Gemma and Phi-3 are tested)."
        ) from error
    finally:
        for module, training in was_training.items():
            module.training = training
    # Rotary positions that start elsewhere cost some rounding, which later layers would multiply; learned ones make other states.
    tolerance = max(1e-3, 16 * torch.finfo(alone.dtype).eps)
    change = ((padded - alone).float().norm(dim=-1) / alone.float().norm(dim=-1)).max().item()
    if not change < tolerance:
        raise ValueError(
            f"The text model {_describe(text_model)} gives a text other states beside padding (they change by {change:.2g} of their length): its "
            "positions are absolute, so an embedding would depend on the texts beside it. Take an LLM with rotary positions (Llama, Qwen2, Qwen3, "
            "Mistral, Gemma and Phi-3 are tested)."
        )


def _check_layers(text_model: nn.Module, num_padding: int) -> torch.Tensor:
    """Check all layers on texts with `num_padding` tokens of padding on the left. Returns a text's states after the first layer, or the last ones where the
    layers are of a class of their own: `(num_tokens, hidden_size)`.
    """
    embeddings = text_model.get_input_embeddings().weight
    # Offloaded weights, which are on "meta", come in as they are needed.
    device = "cpu" if embeddings.device.type == "meta" else embeddings.device
    config = text_model.config
    pad = max(getattr(config, "pad_token_id", None) or 0, 0)  # some families have none
    # No longer than the first token reaches, in the narrowest sliding window.
    num_tokens = 1 + min(_NUM_TOKENS - 1, getattr(config, "sliding_window", None) or _NUM_TOKENS)
    *tokens, other = [token for token in range(num_tokens + 2) if token != pad][: num_tokens + 1]
    input_ids = torch.tensor([pad] * num_padding + tokens, device=device).repeat(4, 1)
    input_ids[_OTHER_END, -1] = other
    if num_padding:
        input_ids[_OTHER_PADDING, 0] = other
    attention_mask = torch.ones_like(input_ids)
    attention_mask[:, :num_padding] = 0
    layers = [layer for layer in text_model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    handles = []
    after_layers: list[torch.Tensor] = []
    try:
        for number, layer in enumerate(layers):
            name = f"{_describe(text_model)}, layer {number} ({type(layer).__name__}),"
            handles.append(
                layer.register_forward_pre_hook(partial(_let_one_token_differ, input_ids.shape), with_kwargs=True)
            )
            check = partial(_check_output, input_ids.shape, num_padding, name, after_layers)
            handles.append(layer.register_forward_hook(check))
        states = text_model(
            input_ids=input_ids, attention_mask=attention_mask if num_padding else None, use_cache=False
        ).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    _check_states(
        states, num_padding, _describe(text_model)
    )  # all that is checked where the layers are of a class of their own
    return (after_layers[0] if after_layers else states)[_TEXT, num_padding:]


def _let_one_token_differ(
    shape: torch.Size, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """What enters a layer becomes one text whose last token, or padding, is another one: earlier layers have moved all of its tokens."""
    states = args[0] if args else kwargs["hidden_states"]
    if states.shape[:2] != shape:
        return args, kwargs
    mixed = states[_TEXT].repeat(4, 1, 1)
    mixed[_OTHER_END, -1] = states[_OTHER_END, -1]
    mixed[_OTHER_PADDING, 0] = states[_OTHER_PADDING, 0]
    return ((mixed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": mixed})


def _check_output(
    shape: torch.Size,
    num_padding: int,
    name: str,
    after_layers: list[torch.Tensor],
    layer: nn.Module,
    args: tuple,
    output: Any,
) -> None:
    states = output[0] if isinstance(output, tuple) else output
    if states.shape[:2] == shape:
        _check_states(states, num_padding, name)
        after_layers.append(states)


def _check_states(states: torch.Tensor, num_padding: int, name: str) -> None:
    """In states `(4, sequence_length, hidden_size)`, the first token must have moved with the last one and not with the padding."""
    first = states[:, num_padding]
    _, noise, signal, leak = (first - first[_TEXT]).float().abs().amax(dim=1).tolist()
    if not signal > 10 * noise:
        raise ValueError(
            f"The text model {name} stays causal {'in a padded batch' if num_padding else 'without padding'}: its first token does not see the "
            "last one, so its embeddings would be wrong. Try attn_implementation={'text_config': 'eager'}, or take an LLM of another family "
            "(Llama, Qwen2, Qwen3, Mistral, Gemma and Phi-3 are tested)."
        )
    if num_padding and leak > signal / 100:
        raise ValueError(
            f"The text model {name} attends to padding, so an embedding would depend on the texts beside it. Try "
            "attn_implementation={'text_config': 'eager'}."
        )


def _describe(text_model: nn.Module) -> str:
    return f"{type(text_model).__name__} with {text_model.config._attn_implementation!r} attention"
