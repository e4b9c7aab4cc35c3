"""LLMs through `convert`: remote-code folders as plain bidirectional models, chains of LoRA adapters, and the whole text side (g5_*)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    Qwen3Config,
    Qwen3Model,
)

from modeling_proclip import ConversionError, convert
from modeling_proclip.attention_proof import check_bidirectional
from modeling_proclip.pooling import pool_tokens
from tests import golden
from tests.modeling_proclip import tiny
from tests.modeling_proclip.test_golden_text import PIPELINES, assert_close_at_tokens, pipeline_case


ADAPTERS = [golden.GOLDEN_DIR / f"g5_text_pipeline_adapter{i}" for i in (0, 1)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the recorded LLM's folder, to change."""
    return Path(shutil.copytree(tiny.LLAMA_DIR, tmp_path / "llm", copy_function=shutil.copyfile))


def change_config(folder: Path, **values) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | values))


def as_published(folder: Path, architecture: str, prefix: str, victim: Path) -> None:
    """What the caption-contrastive LLMs are: the base model's tensors behind remote code."""
    module = "modeling_llama_encoder"
    change_config(folder, architectures=[architecture], auto_map={"AutoModel": f"{module}.{architecture}"})
    (folder / f"{module}.py").write_text(f"open({str(victim)!r}, 'w')\nraise SystemExit")
    state = load_file(folder / "model.safetensors")
    state = {prefix + name: tensor for name, tensor in state.items()}
    save_file(state | {"lm_head.weight": torch.zeros(420, 32)}, folder / "model.safetensors")


@pytest.mark.parametrize("architecture, prefix", [("LlamaEncoderModel", "model."), ("LlamaBiModel", "")])
def test_remote_code_folder_becomes_a_plain_bidirectional_model(architecture, prefix, folder, tmp_path):
    as_published(folder, architecture, prefix, tmp_path / "ran")
    report = convert(folder, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "out").glob("*.py"))
    assert report.ignored == ["lm_head.weight"]

    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert type(config) is LlamaConfig and config.architectures == ["LlamaModel"] and config.is_causal is False
    model, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model) is LlamaModel and not any(info.values())
    check_bidirectional(model)
    reference, _, _, (ids, mask, embed_mask) = pipeline_case("llm2clip_repo", "no_instruction")
    with torch.no_grad():
        states = model(ids, attention_mask=mask).last_hidden_state
    reference.assert_close("out.no_instruction.embeddings", pool_tokens(states, mask, embed_mask))
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("a red apple")
    assert tokens["input_ids"] == tiny.tokenizer()("a red apple")["input_ids"]


def test_another_family(tmp_path):
    torch.manual_seed(0)
    sizes = {name: value for name, value in tiny.TEXT.items() if not name.endswith("_id")}
    model = Qwen3Model(Qwen3Config(**sizes)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "llm")
    report = convert(tmp_path / "llm", tmp_path / "out")
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    assert report.facts["dtype"] == "bfloat16" and type(loaded) is Qwen3Model
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    check_bidirectional(loaded)


def test_recorded_chain_of_adapters(tmp_path):
    reference = golden.load("g5_lora_merge")
    report = convert(tiny.LLAMA_DIR, tmp_path / "out", lora_adapters=ADAPTERS)
    assert all(adapter.name in report.facts["merged adapters"] for adapter in ADAPTERS)
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    for name in [name for name in reference.outputs if name.startswith("merged.")]:
        reference.assert_close(f"out.{name}", model.state_dict()[name.removeprefix("merged.")])
    ids, mask, embed_mask = (reference.inputs[name] for name in ("input_ids", "attention_mask", "embed_mask"))
    with torch.no_grad():
        states = model(ids, attention_mask=mask).last_hidden_state
    assert_close_at_tokens(reference, "out.last_hidden_state", states)
    reference.assert_close("out.embeddings_mean", pool_tokens(states, mask, embed_mask))
    assert reference.unchecked() == set()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 3}}])
def test_merging_equals_peft(options, tmp_path):
    """Two adapters, the second trained on the merged first, under a causal LM's names too."""
    torch.manual_seed(0)
    base, folders = LlamaModel.from_pretrained(tiny.LLAMA_DIR), []
    for i in range(2):
        settings = LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj", "up_proj"], **options)
        model = get_peft_model(base, settings)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) / 10)
        model.save_pretrained(tmp_path / f"adapter{i}")
        folders.append(tmp_path / f"adapter{i}")
        base = PeftModel.from_pretrained(model.unload(), folders[i]).merge_and_unload()
    as_causal = {
        name.replace("base_model.model.", "base_model.model.model."): tensor
        for name, tensor in load_file(folders[1] / "adapter_model.safetensors").items()
    }
    save_file(as_causal, folders[1] / "adapter_model.safetensors")
    convert(tiny.LLAMA_DIR, tmp_path / "out", lora_adapters=folders)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(tiny.LLAMA_DIR / "model.safetensors")
    for name, tensor in base.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)
    assert not torch.equal(merged["layers.0.mlp.up_proj.weight"], original["layers.0.mlp.up_proj.weight"])


def adapter_with(tmp_path: Path, tensors: dict[str, torch.Tensor] | None = None, **settings) -> Path:
    adapter = Path(shutil.copytree(ADAPTERS[0], tmp_path / "adapter", copy_function=shutil.copyfile))
    content = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(content | settings))
    if tensors:
        save_file(load_file(adapter / "adapter_model.safetensors") | tensors, adapter / "adapter_model.safetensors")
    return adapter


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"use_dora": True}, "use_dora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "no LoRA adapter"),
        ({"bias": "all"}, "without biases"),
        ({"lora_alpha": None}, "lora_alpha"),
        (
            {"tensors": {"base_model.model.layers.0.gone.lora_A.weight": torch.zeros(4, 32)}},
            "unused: adapter 0: base_model.model.layers.0.gone",
        ),
        (
            {"tensors": {"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 31)}},
            "of the wrong shape",
        ),
        ({"tensors": {"base_model.model.layers.0.mlp.up_proj.lora_A.weight": torch.full((4, 32), torch.nan)}}, "NaN"),
    ],
)
def test_adapters_that_are_more_than_plain_lora_are_refused(settings, message, tmp_path):
    adapter = adapter_with(tmp_path, **settings)
    with pytest.raises(ConversionError, match=message):
        convert(tiny.LLAMA_DIR, tmp_path / "out", lora_adapters=[adapter])
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_its_base_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ConversionError, match=r"PEFT adapter: convert its base model \(g5_text_pipeline_hf\).*--lora"):
        convert(ADAPTERS[0], tmp_path / "out")


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"num_hidden_layers": 10**9},
            "config.json: num_hidden_layers is 1000000000, and no model has more than 1,000",
        ),
        ({"hidden_size": 64}, "of the wrong shape"),
        ({"num_attention_heads": 5}, "No model"),
        ({"model_type": "clip"}, "No model|not in the checkpoint|unused"),
        ({"model_type": None}, "no model_type"),
        ({"rope_scaling": {"rope_type": "nonsense"}}, "No model"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(values, message, folder, tmp_path):
    change_config(folder, **values)
    with pytest.raises(ConversionError, match=message):
        convert(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llm"]


def test_an_llm_file_without_its_folder_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="without its config.json"):
        convert(tiny.LLAMA_DIR / "model.safetensors", tmp_path / "out")


@pytest.mark.parametrize(
    "options, names",
    [
        ({"text_model": tiny.LLAMA_DIR}, "text_model is"),
        ({"head_width": 72, "prompt_template": "{text}"}, "head_width, prompt_template are"),
        ({"quick_gelu": False, "image_size": 224, "patch_size": 14}, "quick_gelu, image_size, patch_size are"),
        ({"rope_pretrained_grid": 24, "adapter_input_norm": "l2"}, "rope_pretrained_grid, adapter_input_norm are"),
        ({"vision_processor": "x", "text_model_revision": "main"}, "vision_processor, text_model_revision are"),
    ],
)
def test_options_of_vision_towers_are_refused_for_an_llm(options, names, tmp_path):
    with pytest.raises(ConversionError, match=f"is an LLM itself: {names} for the checkpoint of a vision tower"):
        convert(tiny.LLAMA_DIR, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# A checkpoint that names its LLM


def published_for_the_llm(tmp_path: Path) -> Path:
    """The recorded ViT with an adapter for the tiny Llama's 32 dimensions."""
    params = golden.load("g2_vit_quickgelu").params
    for name, tensor in list(params.items()):
        if name.startswith("text."):
            params[name] = torch.randn(
                [32 if n == 24 else n for n in tensor.shape], generator=torch.Generator().manual_seed(1)
            )
    torch.save(params, tmp_path / "published.pt")
    return tmp_path / "published.pt"


@pytest.mark.parametrize("which", PIPELINES)
def test_recorded_pipeline_from_texts_through_a_converted_checkpoint(which, tmp_path):
    """Converter for both halves, then strings in: the reference's embeddings, where it did not cut the text."""
    reference, texts, _, _ = pipeline_case(which, "no_instruction")
    convert(tiny.LLAMA_DIR, tmp_path / "llm")
    options = {"head_width": 8, "text_model": tmp_path / "llm"}
    report = convert(published_for_the_llm(tmp_path), tmp_path / "out", prompt_template=tiny.LLAMA3, **options)
    assert report.facts["prompt template"] == repr(tiny.LLAMA3)
    model, processor = (
        AutoModel.from_pretrained(tmp_path / "out").eval(),
        AutoProcessor.from_pretrained(tmp_path / "out"),
    )
    assert model.config.text_model_name_or_path == str(tmp_path / "llm") and model.config.lean
    with torch.no_grad():
        embeds = model.get_llm_embeds(**processor(text=texts, return_tensors="pt"))
    others = [0, 1, 2, 4]  # text 3 is longer than the 40 tokens that the reference read
    torch.testing.assert_close(
        embeds[others], reference.outputs["no_instruction.embeddings"][others], atol=3e-5, rtol=1e-5
    )
    with torch.no_grad():
        features = model.get_text_features(**processor(text=texts, return_tensors="pt")).pooler_output
    assert torch.equal(features, model.get_text_features(llm_embeds=embeds).pooler_output)


def test_template_comes_from_the_llms_own_chat_markers(folder, tmp_path):
    """Not from its name; a tokenizer without a chat template is said."""
    published = published_for_the_llm(tmp_path)
    silent = convert(published, tmp_path / "silent", head_width=8, text_model=folder, dry_run=True)
    assert any("no chat template" in note for note in silent.notes)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    )
    convert(folder, tmp_path / "renamed")
    report = convert(published, tmp_path / "out", head_width=8, text_model=tmp_path / "renamed")
    assert not report.notes
    assert AutoProcessor.from_pretrained(tmp_path / "out").prompt_template == tiny.LLAMA3


def test_a_named_llm_that_changed_is_refused_at_loading(tmp_path):
    convert(tiny.LLAMA_DIR, tmp_path / "llm")
    convert(published_for_the_llm(tmp_path), tmp_path / "out", head_width=8, text_model=tmp_path / "llm")
    state = load_file(tmp_path / "llm" / "model.safetensors")
    state["norm.weight"] += 1
    save_file(state, tmp_path / "llm" / "model.safetensors")
    with pytest.raises(ValueError, match="SHA-256"):
        AutoModel.from_pretrained(tmp_path / "out")


def test_without_a_named_llm_one_can_be_given_at_loading(tmp_path):
    convert(published_for_the_llm(tmp_path), tmp_path / "out", head_width=8)
    with pytest.raises(ValueError, match="load_text_model=False"):
        AutoModel.from_pretrained(tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out", text_model=tiny.LLAMA_DIR).eval()
    assert model.get_text_features(torch.arange(5)[None]).pooler_output.shape == (1, 16)
