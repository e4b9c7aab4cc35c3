"""What `publish` refuses before anything is sent."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_cards.publish import publish
from hub_cards.staging import PublishError
from tests.hub_cards.publishing import edit, run


def _without(file: str):
    return lambda folder: (folder / file).unlink()


def _weights(change):
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _twice(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')


def _cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(5000)


REFUSALS = {
    "no folder": (shutil.rmtree, "is no folder"),
    "no config": (_without("config.json"), "has no config.json: name the folder"),
    "another model": (lambda f: edit(f / "config.json", model_type="llama"), "a model of type 'llama'.*hf upload"),
    "unknown key": (
        lambda f: edit(f / "config.json", projection_dims=3),
        "no key 'projection_dims'.*'projection_dim'",
    ),
    "no weights": (_without("model.safetensors"), "has no model.safetensors"),
    "a pickle": (_pickled, "Pickles are not published"),
    "two states": (_twice, "holds both model.safetensors and model.safetensors.index.json"),
    "cut short": (_cut, "model.safetensors cannot be read"),
    "tensor missing": (_weights(lambda state: state.pop("logit_scale")), "lacks tensor 'logit_scale'"),
    "tensor too many": (_weights(lambda state: state.update(extra=torch.ones(1))), "its model has not, 'extra'"),
    "another shape": (
        _weights(lambda state: state.update({"text_model.norm.weight": torch.ones(7)})),
        r"'text_model.norm.weight' has shape \(7,\), and config.json says \(32,\)",
    ),
    "no processor": (
        _without("processor_config.json"),
        "no processor, so nobody could use it: processor.save_pretrained",
    ),
    "no tokenizer": (_without("tokenizer.json"), "has no tokenizer.json"),
    "damaged processor": (
        lambda f: (f / "processor_config.json").write_text("{"),
        "processor_config.json cannot be read as JSON",
    ),
    "images of another size": (
        lambda f: edit(
            f / "processor_config.json",
            image_processor={
                **json.loads((f / "processor_config.json").read_text())["image_processor"],
                "crop_size": 24,
            },
        ),
        "makes images of 24 pixels, and the image encoder takes 16",
    ),
    "card without sense": (lambda f: (f / "README.md").write_text("---\nlicense: bogus\n---\n"), "README.md.*'bogus'"),
    "card that is no YAML": (
        lambda f: (f / "README.md").write_text("---\na: [\n---\n"),
        "README.md: the Hub would refuse",
    ),
}


@pytest.mark.parametrize("damage", REFUSALS)
def test_refuses_what_would_not_load(copy, hub, damage):
    change, message = REFUSALS[damage]
    change(copy)
    result = run(copy, "alice/x")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        publish(copy, "alice/x", dry_run=True)
    assert hub.repositories == {}


def test_refuses_another_llm_s_tokenizer(copy, hub):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 420, "content": "<|new|>"})
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(PublishError, match="tokenizer.json has 421 tokens, and the LLM 420"):
        publish(copy, "alice/x")
