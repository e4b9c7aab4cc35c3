"""`proclip convert`."""

import torch
from transformers import AutoModel
from typer.testing import CliRunner

from tests import golden
from tests.modeling_proclip import tiny
from trainers.cli import app


PUBLISHED = str(golden.GOLDEN_DIR / "g2_vit_quickgelu.trainer.pt")


def run(*arguments: str):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["convert", *arguments])


def test_dry_run_prints_what_is_there_and_writes_nothing(tmp_path):
    result = run(PUBLISHED, str(tmp_path / "out"), "--head-width", "8", "--dry-run")
    assert result.exit_code == 0, result.output
    params = golden.load("g2_vit_quickgelu").params
    count = f"{sum(p.numel() for p in params.values()):,}"
    for expected in (
        "OpenAI CLIP ViT, QuickGELU",
        "32 x 32",
        "2 layers, 4 heads",
        "1 block, expansion 8",
        count,
        "float32",
        "would write model.safetensors",
    ):
        assert expected in result.output, expected
    assert list(tmp_path.iterdir()) == []


def test_options_reach_the_converter(tmp_path):
    arguments = [
        "--head-width",
        "16",
        "--no-quick-gelu",
        "--image-size",
        "48",
        "--adapter-input-norm",
        "none",
        "--dtype",
        "bfloat16",
    ]
    result = run(PUBLISHED, str(tmp_path / "out"), *arguments)
    assert result.exit_code == 0, result.output
    model = AutoModel.from_pretrained(tmp_path / "out", load_text_model=False)
    vision = model.config.vision_config
    assert (vision.num_attention_heads, vision.hidden_act, vision.image_size) == (2, "gelu", 48)
    assert model.config.adapter_input_norm == "none" and model.visual_projection.weight.dtype == torch.bfloat16


def test_adapters_are_merged_in_the_order_given(tmp_path):
    adapters = [str(golden.GOLDEN_DIR / f"g5_text_pipeline_adapter{i}") for i in (0, 1)]
    result = run(str(tiny.LLAMA_DIR), str(tmp_path / "out"), "--lora", adapters[0], "--lora", adapters[1])
    assert result.exit_code == 0, result.output
    reference = golden.load("g5_lora_merge")
    merged = AutoModel.from_pretrained(tmp_path / "out").layers[0].self_attn.q_proj.weight
    reference.assert_close("out.merged.layers.0.self_attn.q_proj.weight", merged)


def test_a_refused_file_is_one_line(tmp_path):
    (tmp_path / "empty.pt").touch()
    result = run(str(tmp_path / "empty.pt"), str(tmp_path / "out"))
    assert result.exit_code == 1
    assert result.stderr == f"error: {tmp_path / 'empty.pt'} is empty.\n"


def test_names_from_the_file_are_not_markup(tmp_path):
    params = golden.load("g2_eva02").params
    torch.save(params, tmp_path / "[red]eva.pt")
    result = run(
        str(tmp_path / "[red]eva.pt"),
        str(tmp_path / "out"),
        "--head-width",
        "8",
        "--rope-pretrained-grid",
        "3",
        "--dry-run",
    )
    assert "[red]eva.pt" in result.output and "6 tensors, such as visual.blocks.0.attn.rope.freqs_cos" in result.output
