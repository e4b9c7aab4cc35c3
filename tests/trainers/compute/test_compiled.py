"""Compiled layers give what the LLM gives."""

import pytest
import torch

from modeling_proclip.packing import pack_rows
from tests.modeling_proclip import tiny
from trainers.compute import compiled, onednn


@torch.no_grad()
def test_compiled_layers_embed_the_same_texts(monkeypatch):
    """Through the tracer only: what a compiler makes of it is the compiler's."""
    asked = []
    compile_module = torch.nn.Module.compile

    def traced(module, *, dynamic):
        asked.append(dynamic)
        compile_module(module, dynamic=dynamic, backend="eager")

    model = tiny.model()
    batches = [pack_rows([{"input_ids": list(range(5, 5 + n))} for n in lengths]) for lengths in ((9, 4), (3, 7, 7))]
    expected = [model.get_llm_embeds(**batch) for batch in batches]
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    compiled.compile_layers(model.text_model)
    assert asked == [True] * model.config.text_config.num_hidden_layers
    for batch, embeds in zip(batches, expected, strict=True):
        torch.testing.assert_close(model.get_llm_embeds(**batch), embeds, atol=1e-6, rtol=0)
    assert set(tiny.model().state_dict()) == set(model.state_dict())


@pytest.mark.skipif(not onednn.HAS_ONEDNN, reason="this torch has no oneDNN")
@torch.no_grad()
def test_compiled_layers_keep_the_compiler_s_linear_layer():
    """Torch's compiler fails on oneDNN's operator with plain weights, which layers that are not compiled go through."""
    traced = []

    def backend(module, inputs):
        traced.extend(node.target for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    layer, rows = torch.nn.Linear(4, 3), torch.ones(2, 4)
    expected = layer(rows)
    with onednn.OneDNNLinear():
        found = torch.compile(layer, backend=backend)(rows)
    torch.testing.assert_close(found, expected)
    assert len(traced) == 1 and "mkldnn" not in str(traced[0])
