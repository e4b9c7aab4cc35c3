"""Checkpoints without the LLM: small, equal once loaded, and never with another LLM."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from modeling_proclip import ProCLIPModel, lean_checkpoint
from modeling_proclip.identity import module_sha256, weights_sha256
from tests.modeling_proclip import tiny


@torch.no_grad()
def assert_same_embeddings(one: ProCLIPModel, other: ProCLIPModel) -> None:
    expected, actual = one(**tiny.inputs()), other(**tiny.inputs())
    assert torch.equal(actual.text_embeds, expected.text_embeds)
    assert torch.equal(actual.image_embeds, expected.image_embeds)


def change_one_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["norm.weight"][3] += 1e-3
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_lean_equals_full_and_holds_the_vision_side_only(pair, lean, tmp_path):
    pair.save_pretrained(tmp_path / "full")
    from_lean, from_full = AutoModel.from_pretrained(lean), AutoModel.from_pretrained(tmp_path / "full")
    assert_same_embeddings(pair, from_full)
    assert_same_embeddings(from_full, from_lean)
    assert from_lean.config.lean and not from_full.config.lean and not pair.config.lean

    with safe_open(lean / "model.safetensors", framework="pt") as tensors:
        assert not [name for name in tensors.keys() if name.startswith("text_model.")]
    own = {name: tensor for name, tensor in pair.state_dict().items() if not name.startswith("text_model.")}
    size = sum(tensor.numel() * tensor.element_size() for tensor in own.values())
    assert size < (lean / "model.safetensors").stat().st_size < size + 10_000
    recorded = json.loads((lean / "config.json").read_text())
    assert recorded["text_model_name_or_path"] == str(tmp_path / "llm")
    assert recorded["text_model_sha256"] == weights_sha256(tmp_path / "llm") == module_sha256(pair.text_model)


def test_stays_as_it_was_loaded(lean, tmp_path):
    model = AutoModel.from_pretrained(lean)
    model.save_pretrained(tmp_path / "again")
    assert "text_model.norm.weight" not in load_file(tmp_path / "again" / "model.safetensors")
    assert_same_embeddings(model, AutoModel.from_pretrained(tmp_path / "again"))
    model.save_pretrained(tmp_path / "whole", lean=False)
    shutil.rmtree(tmp_path / "llm")
    assert_same_embeddings(model, AutoModel.from_pretrained(tmp_path / "whole"))


def test_without_the_llm(lean, pair, tmp_path):
    model = AutoModel.from_pretrained(lean, load_text_model=False)
    assert model.text_model is None
    with pytest.raises(ValueError, match="can only be saved with lean=True"):
        model.save_pretrained(tmp_path / "full", lean=False)
    with torch.no_grad():
        model.text_adapter.projection.weight += 1
        pair.text_adapter.projection.weight += 1
    model.save_pretrained(tmp_path / "trained")
    assert_same_embeddings(pair, AutoModel.from_pretrained(tmp_path / "trained"))


def test_a_trainer_gives_the_state_dict(pair, tmp_path):
    pair.save_pretrained(tmp_path / "lean", lean=True, state_dict=pair.state_dict())
    assert not [name for name in load_file(tmp_path / "lean" / "model.safetensors") if name.startswith("text_model.")]
    assert_same_embeddings(pair, AutoModel.from_pretrained(tmp_path / "lean"))


def test_set_aside_while_training(pair, tmp_path):
    """Trainers that read stored embeddings set `text_model` to None: what they save still says which LLM it belongs to."""
    whole = copy.deepcopy(pair)
    pair.text_model = None
    pair.save_pretrained(tmp_path / "checkpoint")
    assert pair.config.text_model_sha256 == weights_sha256(tmp_path / "llm")
    assert_same_embeddings(whole, AutoModel.from_pretrained(tmp_path / "checkpoint"))
    change_one_weight(tmp_path / "llm")
    with pytest.raises(ValueError, match="SHA-256"):
        AutoModel.from_pretrained(tmp_path / "checkpoint")


# Another LLM


def test_refuses_a_changed_llm(lean, llm):
    change_one_weight(llm)
    with pytest.raises(ValueError, match=r"SHA-256 \w{64}, but .*llm.* has \w{64}. Pass text_model="):
        AutoModel.from_pretrained(lean)
    AutoModel.from_pretrained(lean, load_text_model=False)


def weights_beside_the_index(llm):
    state = load_file(llm / "model.safetensors")
    save_file(state, llm / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    (llm / "model.safetensors.index.json").write_text(json.dumps(index))
    change_one_weight(llm)


def every_tensor_twice(llm):
    state = load_file(llm / "model.safetensors")
    twice = {**{name: tensor + 1 for name, tensor in state.items()}, **{f"model.{k}": v for k, v in state.items()}}
    save_file(twice, llm / "model.safetensors", metadata={"format": "pt"})


def an_adapter(llm):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False)
    peft.get_peft_model(LlamaModel.from_pretrained(llm), lora).save_pretrained(llm)


def another_file_by_name(llm):
    """`transformers_weights` in a configuration names the file to load in place of model.safetensors."""
    state = {name: tensor + 1 for name, tensor in load_file(llm / "model.safetensors").items()}
    save_file(state, llm / "other.safetensors", metadata={"format": "pt"})
    edit_config(llm, transformers_weights="other.safetensors")


def edit_config(folder, **values):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **values}))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (weights_beside_the_index, "weights have SHA-256"),
        (every_tensor_twice, "holds the tensor 'embed_tokens.weight' twice, as 'embed_tokens.weight'"),
        (an_adapter, "adapter_config.json: this adapter would be loaded into the LLM"),
        (another_file_by_name, "text_config.transformers_weights is not given there and 'other.safetensors' here"),
        (lambda llm: edit_config(llm, rms_norm_eps=0.1), "text_config.rms_norm_eps is 1e-06 there and 0.1 here"),
        (lambda llm: edit_config(llm, hidden_act="relu"), "text_config.hidden_act is 'silu' there and 'relu' here"),
        (
            lambda llm: edit_config(llm, rope_parameters={"rope_theta": 100.0, "rope_type": "default"}),
            "text_config.rope_parameters.rope_theta is 10000.0 there and 100.0 here",
        ),
    ],
)
def test_refuses_an_llm_that_would_load_as_another_one(lean, llm, pair, tamper, message):
    tamper(llm)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(lean)
    if "text_config" in message:
        with pytest.raises(ValueError, match=message):
            ProCLIPModel.from_pretrained(lean, text_model=LlamaModel.from_pretrained(llm))
        with pytest.raises(ValueError, match=f"{message}.*a lean checkpoint would lose that"):
            pair.save_pretrained(lean, lean=True)


def test_refuses_what_was_loaded_if_it_is_not_what_was_hashed(lean, monkeypatch):
    """Whatever way Transformers finds to load other weights than the files that have the hash."""

    def load_another(*args, **kwargs):
        model = load_text_tower(*args, **kwargs)
        model.norm.weight.data[3] += 1e-3
        return model

    load_text_tower = lean_checkpoint.load_text_tower
    monkeypatch.setattr(lean_checkpoint, "load_text_tower", load_another)
    with pytest.raises(
        ValueError, match="loads something else from .*llm' than its safetensors: text_model.norm.weight"
    ):
        AutoModel.from_pretrained(lean)
    AutoModel.from_pretrained(lean, verify_text_model=False)


def test_what_changes_no_embedding_is_no_other_llm(lean, llm, pair):
    edit_config(llm, use_cache=False, pad_token_id=7, attention_dropout=0.5, architectures=["LlamaForCausalLM"])
    (llm / "pytorch_model.bin").write_bytes(b"never read")
    assert_same_embeddings(pair, AutoModel.from_pretrained(lean))


def test_says_that_an_llm_cannot_be_told_from_another(lean, pair, monkeypatch):
    said = []
    monkeypatch.setattr(lean_checkpoint.logger, "warning_once", said.append)
    edit_config(lean, text_model_sha256=None)
    assert_same_embeddings(pair, AutoModel.from_pretrained(lean))
    (warning,) = said
    assert "does not record the hash of its LLM's weights" in warning


def test_code_of_an_llm_is_neither_run_nor_asked_for(lean, llm, monkeypatch):
    """Transformers would ask on the terminal whether to run it."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *args: asked.append(args) or "y")
    edit_config(llm, model_type="stranger", auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"})
    (llm / "code.py").write_text("raise SystemExit('it ran')")
    for trust in ({}, {"trust_remote_code": True}):
        with pytest.raises(ValueError, match="llm needs code of its own, which is not run"):
            AutoModel.from_pretrained(lean, **trust)
    with pytest.raises(ValueError, match="llm needs code of its own, which is not run"):
        ProCLIPModel.from_vision_text_pretrained(tiny.clip(), llm)
    assert not asked


def test_refuses_a_missing_llm(lean, llm, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.rmtree(llm)
    with pytest.raises(
        OSError, match="cannot be read.*(?s:.*)Pass text_model=... with its place, or load_text_model=False"
    ):
        AutoModel.from_pretrained(lean)


def test_refuses_an_llm_without_safetensors(lean, llm):
    (llm / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors is missing"):
        AutoModel.from_pretrained(lean)


def test_refuses_an_incomplete_llm(lean, llm):
    state = load_file(llm / "model.safetensors")
    del state["norm.weight"]
    save_file(state, llm / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="llm has no tensor 'norm.weight' of a LlamaModel"):
        AutoModel.from_pretrained(lean)


def test_new_place(lean, llm, pair, tmp_path, monkeypatch):
    shutil.move(llm, tmp_path / "moved")
    assert_same_embeddings(pair, AutoModel.from_pretrained(lean, text_model=tmp_path / "moved"))
    monkeypatch.chdir(tmp_path)
    model = AutoModel.from_pretrained("lean", text_model="moved")
    assert_same_embeddings(pair, model)
    model.save_pretrained(tmp_path / "again")
    monkeypatch.chdir("/")
    assert_same_embeddings(pair, AutoModel.from_pretrained(tmp_path / "again"))
    change_one_weight(tmp_path / "moved")
    with pytest.raises(ValueError, match="SHA-256"):
        AutoModel.from_pretrained(lean, text_model=tmp_path / "moved")


def test_relative_path_is_kept_as_an_absolute_one(llm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), "llm")
    assert model.config.text_model_name_or_path == str(llm)
    loaded = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), LlamaModel.from_pretrained("llm"))
    assert loaded.config.text_model_name_or_path == str(llm)


def test_the_llm_itself(lean, llm, pair):
    assert_same_embeddings(pair, ProCLIPModel.from_pretrained(lean, text_model=LlamaModel.from_pretrained(llm)))
    causal_lm = LlamaForCausalLM.from_pretrained(llm)
    assert_same_embeddings(pair, ProCLIPModel.from_pretrained(lean, text_model=causal_lm))
    smaller = LlamaModel(LlamaConfig(**{**tiny.TEXT, "hidden_size": 16}))
    with pytest.raises(ValueError, match="an LLM of 32 dimensions; the one given has 16"):
        ProCLIPModel.from_pretrained(lean, text_model=smaller)


def test_another_llm_is_taken_only_if_that_is_said(lean, llm, tmp_path):
    other = LlamaModel(LlamaConfig(**tiny.TEXT))
    in_half = LlamaModel.from_pretrained(llm, dtype=torch.bfloat16)
    for model in (other, in_half):
        with pytest.raises(ValueError, match="other weights.*or the same in another dtype.*verify_text_model=False"):
            ProCLIPModel.from_pretrained(lean, text_model=model)
        taken = ProCLIPModel.from_pretrained(lean, text_model=model, verify_text_model=False).text_model
        assert taken.norm.weight is model.norm.weight
    change_one_weight(llm)
    with pytest.raises(ValueError, match="SHA-256.*verify_text_model=False"):
        AutoModel.from_pretrained(lean)
    changed = AutoModel.from_pretrained(lean, verify_text_model=False)
    assert torch.equal(changed.text_model.norm.weight, load_file(llm / "model.safetensors")["norm.weight"])


def test_text_model_is_for_lean_checkpoints(pair, llm, tmp_path):
    pair.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="text_model is for a lean checkpoint"):
        AutoModel.from_pretrained(tmp_path / "full", text_model=llm)
