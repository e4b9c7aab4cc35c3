"""Whatever pushes, pushes through `publish`: private unless asked, checked, complete, with the card and the code."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModel

from hub_cards.publish import publish
from hub_cards.staging import PublishError
from modeling_proclip import ProCLIPModel
from tests.hub_cards.publishing import edit, run
from tests.modeling_proclip import tiny
from trainers.alignment.peft_model import ProCLIPPeftModel


def lora() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules=r"vision_model\..*\.(q_proj|v_proj)")


def processor():
    return tiny.processor(prompt_template=tiny.LLAMA3, max_length=40)


def peft_model(tmp_path: Path) -> ProCLIPPeftModel:
    tiny.model().save_pretrained(tmp_path / "secret-project/base")
    return ProCLIPPeftModel(ProCLIPModel.from_pretrained(tmp_path / "secret-project/base"), lora())


def with_adapters(tmp_path: Path) -> ProCLIPModel:
    model = tiny.model()
    model.add_adapter(lora())
    return model


MAKERS = {
    "model": (lambda tmp_path: tiny.model(), {"config.json", "model.safetensors", "modeling_proclip.py", "README.md"}),
    "processor": (lambda tmp_path: processor(), {"processor_config.json", "tokenizer.json", "processing_proclip.py"}),
    "PEFT model": (peft_model, {"adapter_config.json", "adapter_model.safetensors", "README.md"}),
    "model with adapters": (with_adapters, {"adapter_config.json", "adapter_model.safetensors", "README.md"}),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("how", ["save_pretrained", "push_to_hub"])
def test_private_unless_asked_and_complete(hub, tmp_path, maker, how):
    make, expected = MAKERS[maker]
    pushed = make(tmp_path)

    def push(name: str, **kwargs) -> None:
        if how == "push_to_hub":
            pushed.push_to_hub(name, **kwargs)
        else:
            pushed.save_pretrained(tmp_path / name, push_to_hub=True, **kwargs)

    push("mine")
    push("ours", private=False, commit_message="hello", revision="v2")
    assert hub.repositories["model", "alice/mine"].private and not hub.repositories["model", "alice/ours"].private
    assert hub.repositories["model", "alice/ours"].find("v2").message == "hello"
    assert expected <= set(hub.files("alice/mine"))
    assert not [n for n in hub.files("alice/mine") if b"secret-project" in hub.read("alice/mine", n)]
    with pytest.raises(PublishError, match="alice/ours is there and public"):
        push("ours")


def test_saving_with_a_push_sends_what_it_saved_with_the_processor_beside_it(hub, tmp_path):
    processor().save_pretrained(tmp_path / "mine")
    tiny.model().save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="alice/x", max_shard_size="60KB")
    assert {"tokenizer.json", "model-00001-of-00004.safetensors"} <= set(hub.files("alice/x"))
    publish(tmp_path / "mine", "alice/y")
    assert set(hub.files("alice/y")) == set(hub.files("alice/x"))


def test_without_the_publisher_it_is_private_too(hub, monkeypatch):
    """As for code that was fetched from the Hub, where this package is not installed."""
    monkeypatch.setattr("modeling_proclip.pretrained_proclip.find_publisher", lambda module: None)
    monkeypatch.setattr("modeling_proclip.processing_proclip.find_publisher", lambda module: None)
    tiny.model().push_to_hub("alice/x")
    processor().push_to_hub("alice/y", private=None)
    tiny.model().push_to_hub("alice/z", private=False)
    assert [hub.repositories["model", f"alice/{name}"].private for name in "xyz"] == [True, True, False]


def test_adapters_by_the_command(hub, tmp_path):
    model = peft_model(tmp_path)
    model.save_pretrained(tmp_path / "adapters")
    (tmp_path / "adapters/optimizer.pt").write_text("stays")
    assert run(tmp_path / "adapters", "x").exit_code == 0
    assert set(hub.files("alice/x")) == {".gitattributes", *MAKERS["PEFT model"][1]}
    assert json.loads(hub.read("alice/x", "adapter_config.json"))["base_model_name_or_path"] == "base"
    for options, message in (
        (("--lean",), "for whole checkpoints"),
        (("--text-model", "a/b"), "for whole checkpoints"),
    ):
        assert message in " ".join(run(tmp_path / "adapters", "x", *options).output.split())


def test_adapters_name_no_module_of_others(hub, tmp_path):
    peft_model(tmp_path).save_pretrained(tmp_path / "adapters")
    edit(tmp_path / "adapters/adapter_config.json", auto_mapping={"base_model_class": "X", "parent_library": "evil"})
    publish(tmp_path / "adapters", "alice/x")
    assert b"evil" not in hub.read("alice/x", "adapter_config.json")


def test_adapters_that_are_not_finite_or_another_model_s_are_refused(hub, tmp_path):
    model = peft_model(tmp_path)
    with torch.no_grad():
        model.get_base_model().logit_scale.fill_(torch.nan)
    with pytest.raises(ValueError, match="logit_scale.* NaN or infinity"):
        model.push_to_hub("alice/x")
    llm = AutoModel.from_pretrained(tiny.LLAMA_DIR)
    llm.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    llm.save_pretrained(tmp_path / "llm")
    with pytest.raises(PublishError, match="adapters of another model than ProCLIP.*hf upload"):
        publish(tmp_path / "llm", "alice/y")
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://huggingface.co/alice/x", "is an address: give the repository's name, 'alice/x'"),
        ("https://huggingface.co/alice/x/tree/main", "'alice/x'"),
        ("hf.co/alice/x", "'alice/x'"),
        ("https://alice:hunter2@example.org/x", "is not the name of a repository: give OWNER/NAME"),
        ("a/b/c", "is not the name of a repository"),
        ("my model", "is not the name of a repository"),
        ("~/x", "is not the name of a repository"),
        ("", "is not the name of a repository"),
    ],
)
@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_what_is_no_name_of_a_repository_is_said_before_anything_else(checkpoint, hub, name, message, dry_run):
    result = run(checkpoint, name, *dry_run)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and message in result.stderr
    assert "hunter2" not in result.output and not hub.requests
