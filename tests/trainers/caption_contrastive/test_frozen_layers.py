"""Skipping the frozen lower layers gives what the whole LLM gives."""

import pytest
import torch
from transformers import AutoModel, GemmaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

from tests.trainers import tiny_llm
from trainers.caption_contrastive.frozen_layers import FrozenLayerStates


FAMILIES = {
    "llama": tiny_llm.LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "phi3": Phi3Config,
    "gemma": GemmaConfig,
}


def token_rows(lengths=(3, 9, 5, 4)):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 400, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": [1] * len(ids)} for ids in rows]


def padded(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([[4] * (width - len(row["input_ids"])) + row["input_ids"] for row in rows])
    mask = torch.tensor([[0] * (width - len(row["input_ids"])) + row["attention_mask"] for row in rows])
    return ids, mask


@pytest.mark.parametrize("family", list(FAMILIES))
def test_upper_layers_on_stored_states_are_the_whole_llm(family):
    torch.manual_seed(0)
    model = AutoModel.from_config(FAMILIES[family](**tiny_llm.LLM), attn_implementation="eager").eval()
    model.config.is_causal = False
    rows = token_rows()
    states = FrozenLayerStates(model, 2, pad_token_id=4)
    states.fill(rows[:3], token_budget=12)
    states.fill(rows, token_budget=12)
    ids, mask = padded(rows)
    layers = list(model.layers)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask).last_hidden_state
        with states.lower_layers_skipped():
            assert model.layers[2] is layers[2] and model.layers[1] is not layers[1]
            upper = model(inputs_embeds=states.lookup(ids, mask), attention_mask=mask).last_hidden_state
    assert list(model.layers) == layers
    torch.testing.assert_close(upper[mask == 1], whole[mask == 1], atol=1e-5, rtol=0)
    assert row_in(rows[0], states) and not row_in({"input_ids": [1, 2, 3]}, states)


def row_in(row, states) -> bool:
    return row["input_ids"] in states


def test_refusals():
    model = tiny_llm.llm()
    with pytest.raises(ValueError, match="cannot skip 3 of 3 layers"):
        FrozenLayerStates(model, 3, pad_token_id=4)
    with pytest.raises(KeyError, match="text of 3 tokens"):
        FrozenLayerStates(model, 1, pad_token_id=4).lookup(*padded(token_rows((3,))))

    class Scaling(type(model)):
        """As an LLM that does something with its embeddings before the first layer."""

        def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
            embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            return super().forward(inputs_embeds=3 * embeds, **kwargs)

    scaling = Scaling(model.config)
    with pytest.raises(ValueError, match="cache_frozen_layers=False"):
        FrozenLayerStates(scaling, 1, pad_token_id=4)
