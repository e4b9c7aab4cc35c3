"""The LLM side of ProCLIP: pooling of token states, and proof that attention looks both ways."""

import torch
from torch import nn


def pool_tokens(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    token_type_ids: torch.Tensor | None = None,
    pooling: str = "mean",
) -> torch.Tensor:
    """
    One embedding a text from the LLM's token states, as LLM2Vec does it (arXiv 2404.05961; ProCLIP uses "mean").

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Last hidden states.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 1 on tokens, 0 on padding, which may be on either side.
        token_type_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            1 on the tokens to pool (content and end of turn), 0 on BOS, template header and padding: what [`ProCLIPProcessor`] returns.
            All tokens are pooled when it is missing, or in a row where it is 0 throughout.
        pooling (`str`):
            "mean": mean of the pooled tokens. "weighted_mean": the i-th of n pooled tokens weighs i / (1 + ... + n).
            "last_token", "eos_token": the last token (the reference reads both there). "bos_token": the first token.

    Returns:
        `torch.Tensor` of shape `(batch_size, hidden_size)`, in the dtype of `hidden_states`; sums are taken in float32.
    """
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
    attended = attention_mask.to(hidden_states.device).bool()
    if pooling in ("last_token", "eos_token"):
        return hidden_states[rows, torch.where(attended, positions, -1).argmax(dim=1)]
    if pooling == "bos_token":
        return hidden_states[rows, attended.int().argmax(dim=1)]
    pooled = attended if token_type_ids is None else attended & token_type_ids.to(hidden_states.device).bool()
    # The reference averages padding too where a row has nothing to pool; all its real tokens are the sensible reading.
    pooled = torch.where(pooled.any(dim=1, keepdim=True), pooled, attended).float()
    weights = pooled if pooling == "mean" else pooled.cumsum(dim=1) * pooled
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.bmm(weights[:, None], hidden_states.float())[:, 0].to(hidden_states.dtype)


@torch.no_grad()
def check_bidirectional(text_model: nn.Module) -> None:
    """
    Prove that `text_model` attends in both directions, and to tokens only: when the last token changes, the first token's state must move;
    when a padding token changes, it must not.

    Some families ignore `config.is_causal = False` in some attention implementations, with or without padding, so both are tried on the
    model as loaded. Costs two forward passes over four texts of five tokens, in eval mode.

    Raises:
        ValueError: If the first state does not move, or moves with the padding, naming the family and the remedy.
    """
    embeddings = text_model.get_input_embeddings().weight
    # Offloaded weights, which are on "meta", come in as they are needed.
    device = "cpu" if embeddings.device.type == "meta" else embeddings.device
    tokens = torch.arange(1, 6, device=device).remainder(embeddings.shape[0])
    # Rows 0 and 1 are equal, so their difference is the arithmetic's own noise. Row 2 ends and row 3 begins with another token.
    input_ids = tokens.repeat(4, 1)
    input_ids[2, -1] = input_ids[3, 0] = 6 % embeddings.shape[0]
    padded = torch.ones_like(input_ids)
    padded[:, 0] = 0
    was_training = {module: module.training for module in text_model.modules()}
    text_model.eval()
    try:
        for attention_mask, first in ((None, 0), (padded, 1)):
            states = text_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            _, noise, signal, leak = (states[:, first] - states[0, first]).float().abs().amax(dim=1).tolist()
            if not signal > 10 * noise:
                raise ValueError(
                    f"The text model {_describe(text_model)} stays causal {'without padding' if first == 0 else 'in a padded batch'}: its first "
                    "token does not see the last one, so its embeddings would be wrong. Try attn_implementation={'text_config': 'eager'}, or "
                    "take an LLM of another family (Llama, Qwen2, Qwen3, Mistral, Gemma and Phi-3 are tested)."
                )
        if leak > signal / 100:
            raise ValueError(
                f"The text model {_describe(text_model)} attends to padding, so an embedding would depend on the texts beside it. Try "
                "attn_implementation={'text_config': 'eager'}."
            )
    finally:
        for module, training in was_training.items():
            module.training = training


def _describe(text_model: nn.Module) -> str:
    return f"{type(text_model).__name__} with {text_model.config._attn_implementation!r} attention"
