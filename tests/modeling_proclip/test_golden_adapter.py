"""The text adapter against the reference's TextProj and LinearBlock: outputs and every gradient (cases g1_*)."""

import pytest
import torch

from modeling_proclip import ProCLIPConfig
from modeling_proclip.text_adapter import TextAdapter, TextAdapterBlock
from tests import golden
from tests.modeling_proclip import tiny


TEXT_PROJ = ["e2_l4", "e4_l1", "e4_l4", "e8_l1", "e8_l1_nobias", "e8_l4"]


def reference_names(num_layers: int) -> dict[str, str]:
    """Prefixes of the reference's parameters to ours. Its adapter is one `nn.Sequential`; ours gives the parts names."""
    names = {f"text_adaptor.{num_layers}": "layer_norm", f"text_adaptor.{num_layers + 1}": "projection"}
    for i in range(num_layers):
        parts = {"ln": "layer_norm", "fn.0": "fc1", "fn.3": "fc2"}
        names.update({f"text_adaptor.{i}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in parts.items()})
    return names


def our_name(reference_name: str, names: dict[str, str]) -> str:
    prefix, _, kind = reference_name.rpartition(".")
    return f"{names[prefix]}.{kind}"


@pytest.mark.parametrize("input_norm, setting", [("l2", "l2_true"), ("none", "l2_false")])
@pytest.mark.parametrize("case", TEXT_PROJ)
def test_adapter_and_gradients(case, input_norm, setting):
    reference = golden.load(f"g1_textproj_{case}")
    shape = reference.config
    config = ProCLIPConfig(
        text_config=tiny.TEXT | {"hidden_size": shape["embedding_dim"]},
        projection_dim=shape["output_dim"],
        adapter_num_layers=shape["num_layers_text"],
        adapter_expansion=shape["expansion_factor"],
        adapter_output_bias=shape["proj_bias"],
        adapter_layer_norm_eps=shape["layer_norm_eps"],
        adapter_input_norm=input_norm,
    )
    adapter = TextAdapter(config)
    names = reference_names(shape["num_layers_text"])
    adapter.load_state_dict({our_name(name, names): value for name, value in reference.params.items()})

    text_embeds = reference.inputs["text_embeds"].requires_grad_()
    output = adapter(text_embeds)
    (output * reference.inputs["cotangent"]).sum().backward()
    reference.assert_close(f"out.{setting}", output)
    reference.assert_close(f"grad.{setting}.in.text_embeds", text_embeds.grad)
    parameters = dict(adapter.named_parameters())
    for name in reference.params:
        reference.assert_close(f"grad.{setting}.param.{name}", parameters[our_name(name, names)].grad)
    reference.assert_close(f"out.{setting}.zero_embed", adapter(reference.inputs["zero_embed"]))
    assert {name for name in reference.unchecked() if f".{setting}" in name} == set()


def test_block():
    reference = golden.load("g1_linearblock_e8")
    size = reference.config["dim"]
    block = TextAdapterBlock(size, size * reference.config["expansion_factor"], layer_norm_eps=1e-5)
    names = {"ln": "layer_norm", "fn.0": "fc1", "fn.3": "fc2"}
    block.load_state_dict({our_name(name, names): value for name, value in reference.params.items()})
    reference.assert_close("out.y", block(reference.inputs["x"]))
    assert reference.unchecked() == set()


def test_standardize_against_a_naive_reference():
    """`(x - mean) / std`, then unit length, then the plain adapter: forward and the gradient of the input."""
    torch.manual_seed(0)
    shapes = {"text_config": tiny.TEXT | {"hidden_size": 12}, "projection_dim": 5}
    adapter = TextAdapter(ProCLIPConfig(**shapes, adapter_input_norm="standardize"))
    plain = TextAdapter(ProCLIPConfig(**shapes, adapter_input_norm="none"))
    plain.load_state_dict({k: v for k, v in adapter.state_dict().items() if not k.startswith("input_")})
    mean, std = torch.randn(12), torch.rand(12) + 0.5
    adapter.set_input_statistics(mean, std)

    x = torch.randn(4, 12, requires_grad=True)
    naive = torch.stack([plain(z / z.norm()) for z in (x - mean) / std])
    (expected_grad,) = torch.autograd.grad(naive.square().sum(), x)
    (grad,) = torch.autograd.grad(adapter(x).square().sum(), x)
    torch.testing.assert_close(adapter(x), naive)
    torch.testing.assert_close(grad, expected_grad)
    assert {"input_mean", "input_std"} <= set(adapter.state_dict())


def test_anchors_against_a_naive_reference():
    """A text between its own direction and the softmax mean of the anchors, by the cosine with the nearest: forward and gradient."""
    torch.manual_seed(0)
    shapes = {"text_config": tiny.TEXT | {"hidden_size": 12}, "projection_dim": 5}
    settings = {"adapter_anchor_threshold": 0.4, "adapter_anchor_temperature": 0.1}
    adapter = TextAdapter(ProCLIPConfig(**shapes, adapter_num_anchors=7, **settings))
    plain = TextAdapter(ProCLIPConfig(**shapes, adapter_input_norm="none"))
    plain.load_state_dict({k: v for k, v in adapter.state_dict().items() if k != "anchors"})
    anchors = torch.nn.functional.normalize(torch.randn(7, 12), dim=-1)
    adapter.anchors.copy_(anchors)

    x = torch.randn(4, 12, requires_grad=True)
    rows = []
    for row in x:
        unit = row / row.norm()
        cosines = torch.stack([unit @ anchor for anchor in anchors])
        mean = sum(w * anchor for w, anchor in zip((cosines / 0.1).softmax(0), anchors, strict=True))
        share = 1 / (1 + torch.exp((0.4 - cosines.max()) / 0.03))
        mixed = share * unit + (1 - share) * mean / mean.norm()
        rows.append(plain(mixed / mixed.norm()))
    naive = torch.stack(rows)
    torch.testing.assert_close(adapter(x), naive)
    (expected_grad,) = torch.autograd.grad(naive.square().sum(), x)
    (grad,) = torch.autograd.grad(adapter(x).square().sum(), x)
    torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-4)

    # On an anchor a text stays what it is; a long way from all of them only its nearest anchors count.
    adapter.anchor_threshold = 0.9
    torch.testing.assert_close(adapter.pull_to_anchors(anchors), anchors, atol=0.05, rtol=0)
    far = torch.nn.functional.normalize(torch.randn(50, 12), dim=-1)
    far = far[(far @ anchors.T).amax(1) < 0.7]
    adapter.anchor_temperature = 1e-5
    torch.testing.assert_close(adapter.pull_to_anchors(far), anchors[(far @ anchors.T).argmax(1)], atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "mean, std, message",
    [
        (torch.zeros(12), torch.zeros(12), "positive"),
        (torch.zeros(12), -torch.ones(12), "positive"),
        (torch.full((12,), torch.nan), torch.ones(12), "finite"),
        (torch.zeros(11), torch.ones(12), r"\(12,\), got \(11,\)"),
    ],
)
def test_bad_statistics_are_refused(mean, std, message):
    adapter = TextAdapter(ProCLIPConfig(text_config=tiny.TEXT | {"hidden_size": 12}, adapter_input_norm="standardize"))
    with pytest.raises(ValueError, match=message):
        adapter.set_input_statistics(mean, std)
    assert torch.equal(adapter.input_std, torch.ones(12)), "a refused call changed the statistics"


def test_statistics_need_an_adapter_that_standardises():
    adapter = TextAdapter(ProCLIPConfig(text_config=tiny.TEXT | {"hidden_size": 12}))
    with pytest.raises(ValueError, match="adapter_input_norm"):
        adapter.set_input_statistics(torch.zeros(12), torch.ones(12))
