"""LLMs whose rotary positions depend on the longest text of a batch, or on the texts before it."""

from typing import Any

import torch


def rotary_boundary(config: Any, longest: int) -> int | None:
    """The length in tokens beyond which an LLM has other rotary frequencies; None if they are always the same. It chooses them by the longest
    text of a batch (LongRoPE), so that shorter texts must not be in one with longer ones.

    Args:
        config: The LLM's; a module of your own need not have one.
        longest: Length of the longest text.

    Raises:
        ValueError: If they depend on all texts that came before (dynamic RoPE).
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if rope.get("rope_type") == "longrope":
            return rope["original_max_position_embeddings"]
        if rope.get("rope_type") == "dynamic" and longest > (limit := config.max_position_embeddings):
            raise ValueError(
                f"a text has {longest} tokens, and beyond {limit} this LLM's positions (dynamic RoPE) depend on the texts before it: set "
                f"processor.max_length = {limit}"
            )
    return None


def check_lengths(config: Any, attention_mask: torch.Tensor) -> None:
    """Raises ValueError if the texts of a padded batch, with `attention_mask (batch_size, sequence_length)`, would get other rotary positions than
    each of them alone.
    """
    width = attention_mask.shape[1]
    boundary = rotary_boundary(config, width)
    if boundary is None or width <= boundary:
        return
    shortest = int(attention_mask.sum(dim=1).min())
    if shortest <= boundary:
        raise ValueError(
            f"beyond {boundary} tokens this LLM has other positions (LongRoPE), and it takes those of the longest text for a whole batch: a text of "
            f"{shortest} tokens was padded to {width}. Embed shorter and longer texts apart, as `proclip embed` does, or set "
            f"processor.max_length = {boundary}"
        )
