"""`publish` of checkpoints with and without their LLM, to repositories with and without it."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaModel

from hub_cards.publish import publish
from hub_cards.staging import PublishError
from modeling_proclip import ProCLIPModel
from tests.environments import REPOSITORY
from tests.modeling_proclip import tiny


@pytest.fixture
def llm(tmp_path, hub) -> str:
    """An LLM on the Hub; its commit is the repository's."""
    torch.manual_seed(1)
    LlamaModel(LlamaConfig(**tiny.TEXT)).save_pretrained(tmp_path / "llm")
    HfApi().create_repo("alice/llm")
    HfApi().upload_folder(repo_id="alice/llm", folder_path=tmp_path / "llm")
    return "alice/llm"


@pytest.fixture
def pair(tmp_path, llm) -> ProCLIPModel:
    torch.manual_seed(2)
    return ProCLIPModel.from_vision_text_pretrained(tiny.clip(), tmp_path / "llm", adapter_num_layers=1)


def save(model: ProCLIPModel, folder: Path, **kwargs) -> Path:
    model.save_pretrained(folder, **kwargs)
    tiny.processor(prompt_template=tiny.LLAMA3, max_length=40).save_pretrained(folder)
    return folder


def test_lean_of_a_full_checkpoint_sends_the_vision_side_only(pair, llm, hub, tmp_path):
    full = save(pair, tmp_path / "full")
    estimate = publish(full, "alice/x", lean=True, text_model=llm, dry_run=True)
    before = hub.bytes_received("^/lfs/")
    report = publish(full, "alice/x", lean=True, text_model=llm)
    own = {name: tensor for name, tensor in pair.state_dict().items() if not name.startswith("text_model.")}
    size = sum(tensor.numel() * tensor.element_size() for tensor in own.values())
    sent = hub.bytes_received("^/lfs/") - before
    assert size < sent == estimate.files["model.safetensors"] == report.files["model.safetensors"] < size + 6_000
    assert report.lean and report.text_model_bytes == sum(t.nbytes for t in pair.text_model.state_dict().values())
    settings = json.loads(hub.read("alice/x", "config.json"))
    assert settings["lean"] and settings["text_model_name_or_path"] == llm
    assert settings["text_model_revision"] == hub.repositories["model", llm].branches["main"]
    with safe_open(hub.blob_path(hub.files("alice/x")["model.safetensors"].sha256), framework="pt") as tensors:
        assert set(tensors.keys()) == set(own)
        assert all(torch.equal(tensors.get_tensor(name), own[name]) for name in own)


def test_full_of_a_lean_checkpoint_holds_the_llm(pair, hub, tmp_path):
    lean = save(pair, tmp_path / "lean", lean=True)
    (lean / "README.md").write_text("---\nlicense: mit\n---\nlean")
    estimate = publish(lean, "alice/x", lean=False, dry_run=True)
    report = publish(lean, "alice/x", lean=False)
    assert report.notes == ["README.md is sent as it is: check what it says about the LLM."]
    assert report.files == estimate.files and not report.lean and report.text_model_bytes == 0
    state = load_file(hub.blob_path(hub.files("alice/x")["model.safetensors"].sha256))
    ours = pair.state_dict()
    assert state.keys() == ours.keys() and all(torch.equal(state[name], ours[name]) for name in ours)


def test_lean_needs_an_llm_that_others_can_find(pair, llm, hub, tmp_path):
    lean = save(pair, tmp_path / "lean", lean=True)
    with pytest.raises(PublishError, match="names a folder of this machine, '.*llm'. Name the same LLM on the Hub"):
        publish(lean, "alice/x")
    with pytest.raises(PublishError, match="'llm' is not a name on the Hub"):
        publish(lean, "alice/x", text_model="llm")
    report = publish(lean, "alice/x", text_model=llm)
    assert report.lean and str(tmp_path) not in hub.read("alice/x", "config.json").decode()
    assert ("model", "alice/x") in hub.repositories
    with torch.no_grad():
        pair.text_model.norm.weight[0] += 1
    changed = save(pair, tmp_path / "changed")
    with pytest.raises(ValueError, match=r"SHA-256 \w{64}, but 'alice/llm' has"):
        publish(changed, "alice/x", lean=True, text_model=llm)
    with pytest.raises(PublishError, match="leave text_model out"):
        publish(changed, "alice/x", text_model=llm)
    assert not list(tmp_path.glob(".*publish*"))


def test_beside_an_8b_llm_the_vision_side_only_is_foretold_and_sent(hub):
    """The benchmark with a small image encoder and a short adapter; docs/benchmarks.md has its numbers for ViT-L/14."""
    measure = runpy.run_path(str(REPOSITORY / "benchmarks" / "publish.py"))["measure"]
    found = measure("tiny", adapter_num_layers=0)
    assert found["arrived"] == found["foretold"]
    assert found["tensors"] < found["weights sent"] < found["tensors"] + 10_000
    assert found["second publish, weights"] == 0
    parameters = 8_030_261_248 - 128_256 * 4_096  # Llama-3-8B's, without its head
    assert found["the LLM, named"] == 2 * parameters
    assert (
        2 * parameters < found["full, foretold"] - found["weights sent"] < 2 * parameters + 250_000
    )  # with code and card
