"""Names of models, data, tasks and metrics come from anybody's files: on a card they are text, whatever is in them."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, RepoCard
from markdown_it import MarkdownIt

from hub_cards import adapter_card, converted_card, model_card, quickstart_card, text_store_card
from hub_cards.rendering import escape, inline_code
from tests.hub_cards.publishing import edit
from tests.hub_cards.test_model_card import RESULTS
from tests.hub_cards.test_quickstart_card import RESULTS as QUICKSTART
from tests.hub_cards.test_sent_files import RECORD
from tests.modeling_proclip import tiny
from trainers.data import TextEmbeddingStore


MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
HOSTILE = [
    "a | b || c",
    "`code` ``more`` ```",
    "<script>alert(1)</script><!-- <b>",
    "[x](javascript:alert(1)) ![y](https://evil.example/pixel.png) <https://evil.example>",
    "*b* **c** _d_ __e__ ~~f~~ $g$",
    "# heading",
    "- item\n- item\n1. item",
    "x\n\n## Licences\n\n| a | b |\n|---|---|\n",
    "```\nout of the fence\n```\n",
    "---\nlicense: mit\n---\n",
    '"); import os; os.system("x") #',
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &#42; \\* \\",
    "    indented",
    "x\r\u2028\x0b\x1b[31m\u202e",
    "[ref]: https://evil.example",
]


def structure(card: RepoCard) -> list[str]:
    """The elements of a card's Markdown without their text; of code, that it is Python."""
    found = []
    for token in MARKDOWN.parse(card.text):
        if token.type == "fence":
            if token.info == "python":
                compile(token.content, "card", "exec")
            found.append(f"fence {token.info} of {token.content.count(chr(10))}")
        else:
            found.append(token.type)
            found += [child.type for child in token.children or () if child.type not in ("text", "text_special")]
    return found


def model(folder: Path, value: str) -> ModelCard:
    tiny.model().save_pretrained(folder)
    tiny.processor(max_length=40).save_pretrained(folder)
    record = RECORD | {"stage": value, "trainer": value, "settings": {value: value}, "final": {value: value}}
    record |= {"versions": {value: value}, "data": {"source": value, "split": value, "revision": value}}
    towers = json.loads((folder / "config.json").read_text())
    towers = {tower: {**towers[tower], "model_type": value} for tower in ("vision_config", "text_config")}
    names = {"vision_model_name_or_path": value, "text_model_name_or_path": value, "text_pooling": value}
    edit(folder / "config.json", training=[record], **towers, **names)
    edit(folder / "processor_config.json", prompt_template=value + "{text}", instruction=value)
    task = {**RESULTS["tasks"][0], "name": value, "title": value, "metrics": {f"{value} 2": 0.5}, "metric": value}
    task["dataset"] = {"source": value, "revision": value, "split": value, "num_items": 3}
    (folder / "results.json").write_text(json.dumps({**RESULTS, "tasks": [task]}))
    for tower in ("vision", "text"):
        (folder / tower).mkdir()
    return model_card(
        folder,
        title=value,
        license="other",
        license_name=value,
        base_licenses={"vision": value, "text": value},
        datasets={f"d {value}": value},
        base_models={"vision": value},
    )


def adapter(folder: Path, value: str) -> ModelCard:
    from tests.hub_cards.test_one_door import peft_model

    peft_model(folder).save_pretrained(folder / "adapters")
    edit(
        folder / "adapters/adapter_config.json",
        base_model_name_or_path=value,
        target_modules=[value, value],
        modules_to_save=[value],
        r=value,
        lora_alpha=value,
    )
    return adapter_card(folder / "adapters", datasets=[value], license="unknown")


def text_store(folder: Path, value: str) -> RepoCard:
    model, processor = tiny.model(), tiny.processor(max_length=40)
    store = TextEmbeddingStore.build(["a text"], model, processor, folder / "store", progress=False)
    store.fingerprint |= dict.fromkeys(("model", "revision", "pooling", "prompt_template", "instruction"), value)
    return text_store_card(store, texts=value)


def converted(folder: Path, value: str) -> RepoCard:
    return converted_card(value, {value: value}, [value])


def quickstart(folder: Path, value: str) -> RepoCard:
    rows = [{**row, "budget": value} for row in QUICKSTART["rows"]]
    return quickstart_card({**QUICKSTART, "rows": rows, "size": value, "seed": value})


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("make", [model, adapter, text_store, converted, quickstart])
def test_hostile_values_stay_text(tmp_path, make, value):
    harmless, card = make(tmp_path / "harmless", "plain words"), make(tmp_path / "hostile", value)
    assert structure(card) == structure(harmless)
    assert set(card.data.to_dict()) == set(harmless.data.to_dict()) and card.data.license == harmless.data.license


@pytest.mark.parametrize("value", HOSTILE)
def test_what_is_escaped_reads_as_it_was(value):
    (_, inline, _) = MARKDOWN.parse(f"x {escape(value)}")
    assert [child.type for child in inline.children if not child.type.startswith("text")] == []
    shown = "".join(child.content for child in inline.children)
    assert shown == "x " + " ".join("".join(c if c.isprintable() else " " for c in value).split())
    inside_table = MARKDOWN.parse(f"| a |\n|---|\n| {inline_code(value)} |\n")
    (cell,) = [token for token in inside_table if token.type == "inline" and token.content != "a"]
    assert [child.type for child in cell.children] == ["code_inline"]


def test_ordinary_values_are_not_disfigured():
    for value in ("i2t_r@1", "all-MiniLM-L6-v2", "77.8", "-0.5", "owner/name", "1e-05", "a (b), c: d!", "2 × 2", "→"):
        assert escape(value) == value
