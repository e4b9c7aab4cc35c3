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


def edit_tower(file: Path, tower: str, **values) -> None:
    edit(file, **{tower: {**json.loads(file.read_text())[tower], **values}})


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
    "a billion layers": (
        lambda f: edit(f / "config.json", adapter_num_layers=10**9),
        "config.json: adapter_num_layers is 1000000000, and no model has more than 1,000",
    ),
    "a billion layers of a tower": (
        lambda f: edit_tower(f / "config.json", "text_config", num_hidden_layers=10**9, layer_types=["x"]),
        "config.json: num_hidden_layers is 1000000000",
    ),
    "sizes beyond all memory": (
        lambda f: edit_tower(f / "config.json", "text_config", hidden_size=10**12, vocab_size=10**12),
        "config.json: no model can be built from it",
    ),
    "an expansion beyond all numbers": (
        lambda f: edit(f / "config.json", adapter_expansion=1e300),
        "config.json: no model can be built from it",
    ),
    "labels beyond all memory": (
        lambda f: edit_tower(f / "config.json", "vision_config", num_labels=10**9),
        "config.json: num_labels is 1000000000",
    ),
    "images of a billion pixels": (
        lambda f: edit_tower(f / "processor_config.json", "image_processor", size={"shortest_edge": 10**9}),
        "processor_config.json: shortest_edge is 1000000000",
    ),
    "deep JSON": (lambda f: (f / "config.json").write_text('{"a":' * 100_000), "config.json cannot be read as JSON"),
    "a header of four gigabytes": (
        lambda f: (f / "model.safetensors").write_bytes((2**32).to_bytes(8, "little") + b"{"),
        "model.safetensors cannot be read",
    ),
    "a value of another kind": (lambda f: edit(f / "config.json", projection_dim="x"), "No model has these sizes"),
    "towers that are none": (lambda f: edit(f / "config.json", vision_config=[]), "vision_config"),
    "a record that is none": (
        lambda f: edit(f / "config.json", training=[{"steps": 1}]),
        "config.json: the record of the training, 0.stage: Field required",
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
    "card of aliases of aliases": (
        lambda f: (f / "README.md").write_text(
            "---\na0: &a0 [x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))
            + "---\n"
        ),
        "README.md: the Hub would refuse its metadata: with its aliases written out",
    ),
    "card nested too deeply": (
        lambda f: (f / "README.md").write_text(f"---\na: {'[' * 100_000}\n---\n"),
        "README.md: the Hub would refuse its metadata",
    ),
    "card in another encoding": (lambda f: (f / "README.md").write_bytes(b"\xff\xfe"), "README.md is not UTF-8"),
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
