"""The hidden states of an LLM's frozen lower layers never change: they are computed once per text, and the layers are skipped in training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from trainers.display.progress import track
from trainers.text_store.token_batches import TokenRow

from .batches import micro_batches


class _PassThrough(nn.Module):
    """Replaces a decoder layer, and keeps its last input."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self.seen = hidden_states
        return hidden_states


class FrozenLayerStates:
    """The hidden states that enter decoder layer `num_layers` of an LLM, for every text that was filled in.

    They are kept in memory: a token takes hidden size x bytes of the LLM's dtype, so a million short captions take about 100 GB for an LLM of
    size 4,096 in bfloat16. This is meant for texts that are read many times, where the time of the lower layers matters.

    Args:
        text_model: A decoder LLM of Transformers, with or without LoRA in the layers from `num_layers` on.
        num_layers: Number of layers, counted from the embeddings, that are frozen and skipped.
        pad_token_id: The tokenizer's.

    Raises:
        ValueError: If there are fewer layers, or the LLM's output changes when its lower layers are skipped, which is tried here.
    """

    def __init__(self, text_model: nn.Module, num_layers: int, pad_token_id: int):
        if not 0 < num_layers < len(text_model.layers):
            raise ValueError(
                f"cannot skip {num_layers} of {len(text_model.layers)} layers: at least one must be skipped and one left."
            )
        self.text_model, self.num_layers, self.pad_token_id = text_model, num_layers, pad_token_id
        self._places: dict[tuple[int, ...], int] = {}  # the tokens of a text -> its first row in `_states`
        parameter = text_model.get_input_embeddings().weight
        self._states = torch.empty(0, parameter.shape[1], dtype=parameter.dtype)
        self._check()

    def __contains__(self, tokens: Sequence[int]) -> bool:
        return tuple(tokens) in self._places

    @torch.no_grad()
    def fill(self, rows: Sequence[TokenRow], token_budget: int) -> None:
        """Compute the states of texts, each once ("input_ids" identifies it), in batches of similar length and at most `token_budget` padded tokens."""
        new = {tuple(row["input_ids"]): row for row in rows if row["input_ids"] not in self}
        if not new:
            return
        start = len(self._states)
        total = sum(map(len, new))
        self._states = torch.cat([self._states, self._states.new_empty(total, self._states.shape[1])])
        device = self.text_model.get_input_embeddings().weight.device
        batches, order = micro_batches(list(new.values()), self.pad_token_id, token_budget=token_budget)
        keys = list(new)
        positions = iter(order.tolist())
        was_training = self.text_model.training
        self.text_model.eval()
        for batch in track(batches, "computing the frozen layers", "batches"):
            states = self._lower(batch["input_ids"].to(device), batch["attention_mask"].to(device)).cpu()
            for row, mask in zip(states, batch["attention_mask"].bool(), strict=True):
                key = keys[next(positions)]
                self._states[start : start + len(key)] = row[mask]
                self._places[key] = start
                start += len(key)
        self.text_model.train(was_training)

    def lookup(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The states of a padded batch, `(batch_size, sequence_length, hidden_size)`, on the device of `input_ids` and 0 on padding. KeyError if a text was
        not filled in.
        """
        states = self._states.new_zeros(*input_ids.shape, self._states.shape[1])
        for row, ids, mask in zip(states, input_ids.cpu(), attention_mask.cpu().bool(), strict=True):
            tokens = tuple(ids[mask].tolist())
            if tokens not in self._places:
                raise KeyError(f"the frozen layers' states of a text of {len(tokens)} tokens were not computed")
            start = self._places[tokens]
            row[mask] = self._states[start : start + len(tokens)]
        return states.to(input_ids.device)

    @contextmanager
    def lower_layers_skipped(self) -> Iterator[None]:
        """Within this context the LLM takes the states as `inputs_embeds` and runs only its upper layers."""
        with self._replaced(range(self.num_layers)):
            yield

    @contextmanager
    def _replaced(self, numbers: range) -> Iterator[list[_PassThrough]]:
        layers = self.text_model.layers
        originals = [layers[i] for i in numbers]
        stand_ins = [_PassThrough() for _ in numbers]
        try:
            for i, stand_in in zip(numbers, stand_ins, strict=True):
                layers[i] = stand_in
            yield stand_ins
        finally:
            for i, original in zip(numbers, originals, strict=True):
                layers[i] = original

    def _lower(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        with self._replaced(range(self.num_layers, len(self.text_model.layers))) as stand_ins:
            self.text_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            return stand_ins[0].seen

    @torch.no_grad()
    def _check(self) -> None:
        weight = self.text_model.get_input_embeddings().weight
        input_ids = torch.arange(1, 11, device=weight.device).remainder(len(weight)).reshape(2, 5)
        mask = torch.ones_like(input_ids)
        mask[0, 0] = 0
        was_training = self.text_model.training
        self.text_model.eval()
        try:
            whole = self.text_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
            states = self._lower(input_ids, mask)
            with self.lower_layers_skipped():
                parts = self.text_model(inputs_embeds=states, attention_mask=mask, use_cache=False).last_hidden_state
        finally:
            self.text_model.train(was_training)
        if not torch.allclose(whole[mask.bool()], parts[mask.bool()], rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"the output of {type(self.text_model).__name__} changes when its lower layers are skipped (it does more with its embeddings "
                "than pass them to the first layer): set cache_frozen_layers=False."
            )
