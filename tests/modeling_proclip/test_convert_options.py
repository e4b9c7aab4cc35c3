"""What `convert` reads from shapes, and its options: picture and patch size, processors, dtype, heads."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoImageProcessor

from modeling_proclip import ConversionError, convert
from modeling_proclip.conversion.positions import resize_patches, resize_positions
from tests import golden
from tests.modeling_proclip import tiny
from tests.modeling_proclip.test_convert import CASES, assert_outputs, load


def test_positions_are_resized_as_recorded():
    reference = golden.load("g2_pos_embed_resize")
    inputs = reference.inputs
    clip = resize_positions(inputs["clip.visual.positional_embedding"], 6, leading=1, align_corners=True)
    reference.assert_close("out.clip.visual.positional_embedding", clip)
    reference.assert_close(
        "out.eva.visual.pos_embed", resize_positions(inputs["eva.visual.pos_embed"][0], 6, leading=1)[None]
    )
    reference.assert_close(
        "out.eva.visual.patch_embed.proj.weight", resize_patches(inputs["eva.visual.patch_embed.proj.weight"], 4)
    )
    assert reference.unchecked() == set()


@pytest.mark.parametrize("case, align_corners", [("g2_vit_quickgelu", True), ("g2_eva02", False)])
def test_image_size(case, align_corners, tmp_path):
    """Patches of the positions by bicubic interpolation, the class token's as it is; rotary positions are scaled, not resized."""
    params = golden.load(case).params
    torch.save(params, tmp_path / "published.pt")
    convert(tmp_path / "published.pt", tmp_path / "out", image_size=48, **CASES[case])
    model = load(tmp_path / "out")
    stored = params["visual.positional_embedding" if align_corners else "visual.pos_embed"].reshape(17, 32)
    patches = stored[1:].T.reshape(1, 32, 4, 4)
    expected = F.interpolate(patches, (6, 6), mode="bicubic", align_corners=align_corners)[0].flatten(1).T
    positions = model.vision_model.embeddings.position_embedding
    positions = positions.weight if align_corners else positions
    torch.testing.assert_close(positions[1:], expected)
    assert torch.equal(positions[0], stored[0])
    assert model.get_image_features(torch.zeros(1, 3, 48, 48)).pooler_output.shape == (1, 16)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor(Image.new("RGB", (90, 60)), return_tensors="pt")["pixel_values"].shape == (1, 3, 48, 48)


def test_patch_size_of_eva(tmp_path):
    params = golden.load("g2_eva02").params
    torch.save(params, tmp_path / "published.pt")
    convert(tmp_path / "published.pt", tmp_path / "out", image_size=24, patch_size=6, **CASES["g2_eva02"])
    kernel = load(tmp_path / "out").vision_model.embeddings.patch_embedding.weight
    expected = F.interpolate(params["visual.patch_embed.proj.weight"], (6, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(kernel, expected)


def test_image_processors_of_the_towers(tmp_path):
    red = Image.new("RGB", (64, 32), (255, 0, 0))
    for case, mean, std in (
        ("g2_vit_quickgelu", [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        ("g2_eva02", [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        ("g2_siglip2_timm", [0.5] * 3, [0.5] * 3),
    ):
        torch.save(golden.load(case).params, tmp_path / "published.pt")
        report = convert(tmp_path / "published.pt", tmp_path / case, **CASES.get(case, {"head_width": 8}))
        size = report.config.vision_config.image_size
        pixels = AutoImageProcessor.from_pretrained(tmp_path / case)(red, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, size, size)
        expected = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(mean)) / torch.tensor(std)
        torch.testing.assert_close(pixels.mean(dim=(0, 2, 3)), expected, atol=1e-3, rtol=0)


def test_vision_processor_is_taken_and_its_size_checked(tmp_path):
    published = golden.GOLDEN_DIR / "g2_vit_quickgelu.bare.pt"
    tiny.image_processor().save_pretrained(tmp_path / "small")
    with pytest.raises(ConversionError, match=r"\(16, 16\) pixels, and the tower takes \(32, 32\)"):
        convert(published, tmp_path / "out", head_width=8, vision_processor=tmp_path / "small")
    square = {"height": 32, "width": 32}
    type(tiny.image_processor())(size=square, do_center_crop=False, image_mean=[0.1] * 3).save_pretrained(
        tmp_path / "own"
    )
    convert(published, tmp_path / "out", head_width=8, vision_processor=tmp_path / "own")
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").image_mean == (0.1, 0.1, 0.1)


def test_what_shapes_tell(tmp_path):
    report = convert(golden.GOLDEN_DIR / "g2_vit_quickgelu.trainer.pt", tmp_path / "out", head_width=8, dry_run=True)
    vision = report.config.vision_config
    sizes = (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, vision.num_attention_heads)
    assert sizes == (32, 128, 2, 4) and (vision.image_size, vision.patch_size) == (32, 8)
    assert (report.config.projection_dim, report.config.adapter_num_layers, report.config.adapter_expansion) == (
        16,
        1,
        8,
    )
    assert (report.config.adapter_input_norm, report.config.text_config.hidden_size) == ("l2", 24)
    params = golden.load("g2_vit_quickgelu").params
    assert report.facts["parameters"] == f"{sum(p.numel() for p in params.values()):,}"
    assert report.files == {"model.safetensors": 4 * sum(p.numel() for p in params.values())}
    assert not report.written and list(tmp_path.iterdir()) == [], "a dry run writes nothing"


def test_unneeded_rotary_tables_are_reported_and_checked(tmp_path):
    params = golden.load("g2_eva02").params
    torch.save(params, tmp_path / "published.pt")
    report = convert(tmp_path / "published.pt", tmp_path / "out", dry_run=True, **CASES["g2_eva02"])
    assert sorted(report.ignored) == sorted(name for name in params if "rope" in name)
    with pytest.raises(ConversionError, match="grid of 3, not of 16: pass rope_pretrained_grid=3"):
        convert(tmp_path / "published.pt", tmp_path / "out", head_width=8)
    torch.save({name: tensor for name, tensor in params.items() if "rope" not in name}, tmp_path / "without.pt")
    convert(tmp_path / "without.pt", tmp_path / "out", **CASES["g2_eva02"])
    assert_outputs(golden.load("g2_eva02"), load(tmp_path / "out"))


def test_adapter_input_norm_can_be_said(tmp_path):
    convert(golden.GOLDEN_DIR / "g2_vit_quickgelu.bare.pt", tmp_path / "out", head_width=8, adapter_input_norm="none")
    model = load(tmp_path / "out")
    embeds = torch.randn(2, 24)
    with torch.no_grad():
        assert not torch.allclose(model.text_adapter(embeds), model.text_adapter(2 * embeds))


def test_dtype_option(tmp_path):
    published = golden.GOLDEN_DIR / "g2_vit_quickgelu.bare.pt"
    convert(published, tmp_path / "out", head_width=8, dtype=torch.bfloat16)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for name, t in state.items() if name != "logit_scale"} == {torch.bfloat16}
    assert load(tmp_path / "out").visual_projection.weight.dtype == torch.bfloat16
    params = golden.load("g2_vit_quickgelu").params
    params["visual.proj"][0, 0] = 1e5
    torch.save(params, tmp_path / "large.pt")
    with pytest.raises(ConversionError, match=r"visual\.proj overflows in float16"):
        convert(tmp_path / "large.pt", tmp_path / "half", head_width=8, dtype=torch.float16)
    assert not (tmp_path / "half").exists()


def test_so400m_has_heads_of_72(tmp_path):
    """Its width is a multiple of 64 too, so the default would give a model that runs and is wrong."""
    shapes = {name: tensor.shape for name, tensor in golden.load("g2_siglip2_timm").params.items()}
    params = {}
    for name, shape in shapes.items():
        wide = [1152 * (n // 32) if n in (32, 64, 96) and name.startswith("visual") else n for n in shape]
        params[name] = torch.zeros([1152 if (n == 32 and "text_adaptor.3" in name) else n for n in wide])
    torch.save(params, tmp_path / "published.pt")
    report = convert(tmp_path / "published.pt", tmp_path / "out", dry_run=True)
    assert report.config.vision_config.num_attention_heads == 16
    assert any("72" in note for note in report.notes)


def test_card(tmp_path):
    convert(golden.GOLDEN_DIR / "g2_vit_quickgelu.bare.pt", tmp_path / "out", head_width=8)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "g2_vit_quickgelu.bare.pt" in card and "| tower | OpenAI CLIP ViT, QuickGELU |" in card
    assert "license" not in card.split("---")[1], "the licence is the source's to state"
