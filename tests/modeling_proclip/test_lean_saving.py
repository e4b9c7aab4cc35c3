"""Lean checkpoints when they are saved: what is refused, and LLMs in every layout and dtype."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from modeling_proclip import ProCLIPModel
from modeling_proclip.identity import weights_sha256
from tests.modeling_proclip import tiny
from tests.modeling_proclip.test_lean import assert_same_embeddings, change_one_weight


def test_refuses_to_lose_a_change(pair, tmp_path):
    with torch.no_grad():
        pair.text_model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="text_model.layers.1.mlp.up_proj.weight is not what .*llm holds"):
        pair.save_pretrained(tmp_path / "lean", lean=True)
    pair.text_model.save_pretrained(tmp_path / "tuned")
    pair.config.text_model_name_or_path = str(tmp_path / "tuned")
    pair.save_pretrained(tmp_path / "lean", lean=True)
    assert_same_embeddings(pair, AutoModel.from_pretrained(tmp_path / "lean"))


def test_refuses_to_lose_added_parts(pair, tmp_path):
    pair.text_model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="text_model.layers.0.extra.weight is not what"):
        pair.save_pretrained(tmp_path / "lean", lean=True)
    del pair.text_model.layers[0].extra
    pair.resize_token_embeddings(430)
    with pytest.raises(ValueError, match="text_model.embed_tokens.weight is not what"):
        pair.save_pretrained(tmp_path / "lean", lean=True)


def test_refuses_an_llm_without_a_name(tmp_path):
    with pytest.raises(ValueError, match="set model.config.text_model_name_or_path"):
        tiny.model().save_pretrained(tmp_path, lean=True)
    assert not (tmp_path / "config.json").exists()


def test_a_changed_llm_in_a_full_checkpoint_is_not_mistaken_for_its_origin(pair, tmp_path):
    """Tuned in place, saved whole, loaded without the LLM, saved: the last checkpoint must not accept the LLM of the name."""
    with torch.no_grad():
        pair.text_model.norm.weight[0] += 1
    pair.save_pretrained(tmp_path / "full")
    AutoModel.from_pretrained(tmp_path / "full", load_text_model=False).save_pretrained(tmp_path / "lean")
    with pytest.raises(ValueError, match="SHA-256"):
        AutoModel.from_pretrained(tmp_path / "lean")
    pair.text_model.save_pretrained(tmp_path / "tuned")
    assert_same_embeddings(pair, AutoModel.from_pretrained(tmp_path / "lean", text_model=tmp_path / "tuned"))


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_an_llm_on_disk_is_saved_without_being_read(pair, tmp_path):
    pair.save_pretrained(tmp_path / "full")
    device_map = dict.fromkeys(("vision_model", "visual_projection", "text_adapter", "logit_scale"), "cpu")
    device_map["text_model"] = "disk"
    model = AutoModel.from_pretrained(tmp_path / "full", device_map=device_map, offload_folder=tmp_path / "offload")
    assert model.text_model.norm.weight.device.type == "meta"
    for lean in (True, False):
        model.save_pretrained(tmp_path / "again", lean=lean)
        assert_same_embeddings(pair, AutoModel.from_pretrained(tmp_path / "again"))


def test_hash_does_not_depend_on_sharding_or_head(llm, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llm)
    model.save_pretrained(tmp_path / "causal_lm")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    names = set(load_file(tmp_path / "causal_lm" / "model.safetensors"))
    assert "model.norm.weight" in names and "lm_head.weight" in names
    hashes = {weights_sha256(tmp_path / folder) for folder in ("llm", "causal_lm", "shards")}
    assert len(hashes) == 1
    change_one_weight(llm)
    assert weights_sha256(llm) not in hashes


def test_pairs_with_shards_and_with_a_causal_lm(llm, pair, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llm)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    other = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), tmp_path / "shards", adapter_num_layers=1)
    other.text_adapter.load_state_dict(pair.text_adapter.state_dict())
    other.save_pretrained(tmp_path / "lean", lean=True)
    assert other.config.text_model_sha256 == weights_sha256(llm)
    assert_same_embeddings(pair, AutoModel.from_pretrained(tmp_path / "lean"))


def test_gpt_neox_names_its_parts_otherwise(tmp_path):
    """The prefix and the head of a causal-LM checkpoint are the family's own."""
    sizes = {
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **sizes))
    model.save_pretrained(tmp_path / "causal_lm")
    model.gpt_neox.save_pretrained(tmp_path / "base")
    assert weights_sha256(tmp_path / "causal_lm") == weights_sha256(tmp_path / "base")
    pair = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), tmp_path / "causal_lm")
    pair.save_pretrained(tmp_path / "lean", lean=True)
    again = AutoModel.from_pretrained(tmp_path / "lean")
    assert torch.equal(again.get_llm_embeds(torch.tensor([[1, 2]])), pair.get_llm_embeds(torch.tensor([[1, 2]])))


def test_llm_in_another_dtype_than_its_files(llm, tmp_path):
    """The checkpoint names the files, and remembers the dtype that the LLM ran in."""
    dtype = {"text_config": "bfloat16", "vision_config": "float32"}
    pair = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), llm, dtype=dtype)
    pair.save_pretrained(tmp_path / "lean", lean=True)
    again = AutoModel.from_pretrained(tmp_path / "lean")
    assert again.text_model.dtype == torch.bfloat16 and again.vision_model.dtype == torch.float32
    assert_same_embeddings(pair, again)
    upcast = AutoModel.from_pretrained(tmp_path / "lean", dtype={"text_config": torch.float32})
    assert upcast.text_model.dtype == torch.float32


def test_attention_and_device_map_reach_the_llm(lean, pair):
    eager = AutoModel.from_pretrained(lean, attn_implementation={"text_config": "eager"})
    assert eager.text_model.config._attn_implementation == eager.config.text_config._attn_implementation == "eager"
    assert eager.vision_model.config._attn_implementation == "sdpa"
    for device_map in (
        "auto",
        {"": "cpu"},
        {"text_model.layers": "cpu", "text_model": "cpu", "vision_model": "cpu", "": "cpu"},
    ):
        assert_same_embeddings(pair, AutoModel.from_pretrained(lean, device_map=device_map))


@pytest.mark.parametrize("lean", [True, False])
def test_weights_of_nan_are_not_saved(pair, tmp_path, lean):
    pair.visual_projection.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="out was not written: visual_projection.weight holds NaN or infinity"):
        pair.save_pretrained(tmp_path / "out", lean=lean)
    assert not (tmp_path / "out").exists()
