"""What leaves a folder: files by their exact names, no links out of it, no secrets, and no code of others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from hub_cards.publish import publish
from hub_cards.staging import PublishError, stage
from tests.hub_cards.publishing import edit, run
from tests.hub_cards.test_model_card import RESULTS
from tests.hub_cards.test_scrubbing import HF_TOKEN


RECORD = {
    "stage": "s",
    "trainer": "T",
    "steps": 1,
    "num_epochs": 1,
    "batch_size": 1,
    "num_processes": 1,
    "num_rows": 1,
    "settings": {"method": "proclip"},
    "final": {},
    "versions": {},
}
SECRET = b"secret-project"


def staged(source: Path, tmp_path: Path, **kwargs) -> dict[str, bytes]:
    """What `stage` would send, by name."""
    folder = tmp_path / "staged"
    folder.mkdir()
    laid_out = stage(source, folder, "alice/x", **kwargs)
    assert set(laid_out.files) == {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    return {name: (folder / name).read_bytes() for name in laid_out.files}


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE.env",
        "LICENSE-state.pkl",
        "NOTICE_server.key",
        "0_x/credentials.json",
        "1_Normalize/other.json",
        "training_args.bin",
        "optimizer.pt",
        "trainer_state.json",
        "adapter_config.json",
        "tokenizer.json.bak",
        "model-00001-of-00002.safetensors",
        "modeling_proclip.py",
        "id_rsa.png",
    ],
)
def test_only_exact_names_are_sent(copy, tmp_path, name):
    write(copy / name, SECRET.decode())
    sent = staged(copy, tmp_path)
    assert not [file for file, content in sent.items() if SECRET in content and not file.endswith(".safetensors")]
    assert name not in sent or name == "modeling_proclip.py"  # which is ours


def test_licences_are_sent(copy, tmp_path):
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md"):
        write(copy / name, "terms")
    assert {"LICENSE", "NOTICE.txt", "USE_POLICY.md"} <= set(staged(copy, tmp_path))


@pytest.mark.parametrize(
    "name", ["LICENSE", "README.md", "tokenizer.json", "config.json", "model.safetensors", "results.json"]
)
def test_links_out_of_the_folder_are_refused(copy, tmp_path, name):
    outside = tmp_path / "elsewhere"
    if (copy / name).exists():
        shutil.move(copy / name, outside)
    else:
        write(outside, "{}")
    (copy / name).symlink_to(outside)
    with pytest.raises(PublishError, match=f"{name} is a link out of the folder"):
        staged(copy, tmp_path)


def test_a_linked_folder_is_one_too(copy, tmp_path):
    write(tmp_path / "elsewhere/config.json", "{}")
    shutil.rmtree(copy / "1_Normalize")
    (copy / "1_Normalize").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PublishError, match="1_Normalize/config.json is a link out"):
        staged(copy, tmp_path)


def test_the_links_of_the_hub_s_own_cache_are_followed(copy, tmp_path):
    snapshot = tmp_path / "models--alice--x/snapshots/0"
    shutil.copytree(copy, snapshot)
    (tmp_path / "models--alice--x/blobs").mkdir()
    blob = tmp_path / "models--alice--x/blobs/abc"
    shutil.move(snapshot / "config.json", blob)
    (snapshot / "config.json").symlink_to(blob)
    assert "config.json" in staged(snapshot, tmp_path)
    blob.unlink()
    blob.symlink_to(copy / "config.json")  # a link in the cache that leads out of it
    (tmp_path / "staged").rename(tmp_path / "first")
    with pytest.raises(PublishError, match="is a link out of the folder"):
        staged(snapshot, tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "https://alice:secret-project@data.corp/*.tar",
        "../../secret-project/*.tar",
        "secret-project/rows",
        "/a/secret-project/x",
    ],
)
def test_the_record_of_the_training_names_no_folder_and_no_password(copy, tmp_path, source):
    edit(copy / "config.json", training=[{**RECORD, "data": {"source": source, "split": "train", "revision": None}}])
    sent = staged(copy, tmp_path)
    assert not [name for name, content in sent.items() if SECRET in content]
    assert json.loads(sent["config.json"])["training"][0]["steps"] == 1 and b"1 steps of 1 rows" in sent["README.md"]


def test_paths_in_settings_and_texts_are_taken_out_and_it_is_said(copy, tmp_path):
    edit(copy / "tokenizer_config.json", name_or_path="/home/alice/secret-project/llm")
    write(copy / "README.md", "---\nlicense: mit\n---\nMade in /home/alice/secret-project/llm")
    write(copy / "results.json", json.dumps({**RESULTS, "command": "/mnt/secret-project/x --token " + HF_TOKEN}))
    write(copy / "evaluation/results.json", json.dumps(RESULTS))
    report = publish(copy, "alice/x", dry_run=True)
    said = "local paths, passwords or tokens were removed."
    assert {f"{name}: {said}" for name in ("tokenizer_config.json", "README.md", "results.json")} <= set(report.notes)
    sent = staged(copy, tmp_path)
    assert not [name for name, content in sent.items() if SECRET in content or HF_TOKEN.encode() in content]
    assert json.loads(sent["tokenizer_config.json"])["name_or_path"] == "llm"


def test_results_on_own_images_of_an_earlier_release(copy, tmp_path):
    own = {"group": "own", "title": "secret-project/images", "name": "images"}
    own["dataset"] = {"source": "secret-project/images", "num_items": 3, "read_from": "local copy"}
    write(copy / "results.json", json.dumps({**RESULTS, "tasks": [{**RESULTS["tasks"][0], **own}]}))
    sent = staged(copy, tmp_path)
    assert not [name for name, content in sent.items() if SECRET in content]
    assert b"| images | images |" in sent["README.md"]


def test_what_the_model_reads_is_never_changed(copy, tmp_path):
    edit(copy / "processor_config.json", instruction="What is in /home/alice/x.png?")
    assert (
        json.loads(staged(copy, tmp_path)["processor_config.json"])["instruction"] == "What is in /home/alice/x.png?"
    )


@pytest.mark.parametrize("name", ["merges.txt", "vocab.json", "chat_template.jinja", "processor_config.json"])
def test_a_token_where_nothing_can_be_taken_out_is_refused(copy, tmp_path, name):
    if name == "processor_config.json":
        edit(copy / name, instruction=HF_TOKEN)
    else:
        write(copy / name, HF_TOKEN)
    with pytest.raises(PublishError, match=f"{name} holds what looks like a token"):
        staged(copy, tmp_path)


def test_headers_of_weights_say_nothing_else(copy, tmp_path):
    state = load_file(copy / "model.safetensors")
    save_file(state, copy / "model.safetensors", {"format": "pt", "data": "/home/alice/secret-project"})
    with pytest.raises(PublishError, match="its header holds local paths"):
        staged(copy, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(copy, tmp_path, value):
    state = load_file(copy / "model.safetensors")
    state["text_adapter.projection.bias"][1] = value
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    for dry_run in ((), ("--dry-run",)):
        result = run(copy, "alice/x", *dry_run)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1
    with pytest.raises(ValueError, match="'text_adapter.projection.bias' holds NaN or infinity"):
        staged(copy, tmp_path)


# Code of others

EVIL = "evil/repo--evil.Evil"


def _nested(file: str, *keys: str):
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        inner = content
        for key in keys:
            inner = inner[key]
        inner |= {
            "auto_map": {"AutoModel": EVIL, "AutoTokenizer": [None, EVIL]},
            "custom_pipelines": {"x": {"impl": EVIL}},
        }
        inner |= {"attn_implementation": "evil/kernel"}
        (folder / file).write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    "where",
    [
        ("config.json",),
        ("config.json", "text_config"),
        ("config.json", "vision_config"),
        ("processor_config.json",),
        ("processor_config.json", "image_processor"),
        ("tokenizer_config.json",),
        ("sentence_bert_config.json",),
        ("config_sentence_transformers.json",),
        ("1_Normalize/config.json",),
    ],
    ids=".".join,
)
@pytest.mark.parametrize("with_code", [True, False])
def test_no_code_of_others_is_named(copy, tmp_path, where, with_code):
    _nested(*where)(copy)
    sent = staged(copy, tmp_path, with_code=with_code)
    assert not [name for name, content in sent.items() if b"evil" in content]
    maps = [json.loads(sent[name]).get("auto_map") for name in ("config.json", "processor_config.json")]
    assert all(maps) if with_code else not any(maps)


def test_it_is_said_whose_code_was_named(copy):
    _nested("tokenizer_config.json")(copy)
    result = run(copy, "alice/x", "--dry-run")
    assert (
        result.exit_code == 0 and "tokenizer_config.json: references to code of others were removed" in result.output
    )
    assert EVIL in result.output


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ({"path": "", "type": "evil.Module"}, "names the class 'evil.Module'"),
        ({"path": "../1_x", "type": "sentence_transformers.models.Dense"}, "names the folder '../1_x'"),
        ({"path": "1_x"}, "names the class None"),
        ("x", "names the class None"),
    ],
)
def test_modules_of_other_packages_are_refused(copy, tmp_path, module, message):
    (copy / "modules.json").write_text(json.dumps([module]))
    with pytest.raises(PublishError, match=message):
        staged(copy, tmp_path)


def test_a_dense_module_is_sent_with_its_weights_but_not_with_a_class_to_import(copy, tmp_path):
    modules = json.loads((copy / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (copy / "modules.json").write_text(json.dumps([*modules, dense]))
    write(copy / "2_Dense/config.json", json.dumps({"activation_function": "torch.nn.modules.activation.Tanh"}))
    save_file({"linear.weight": torch.ones(2, 2)}, copy / "2_Dense/model.safetensors")
    assert {"2_Dense/config.json", "2_Dense/model.safetensors"} <= set(staged(copy, tmp_path))
    edit(copy / "2_Dense/config.json", activation_function="os.system")
    (tmp_path / "staged").rename(tmp_path / "first")
    with pytest.raises(PublishError, match="names the activation 'os.system'"):
        staged(copy, tmp_path)


# Files of other programs


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "5",
        '{"tasks": 5}',
        '{"tasks": [{}]}',
        '{"rows": [{"model": "proclip"}]}',
        '{"acc": 1}',
        "{",
        "[" * 100_000,
    ],
)
def test_results_of_another_program_break_no_card_and_stay_behind(copy, tmp_path, content):
    write(copy / "results.json", content)
    write(copy / "other/results.json", content)
    sent = staged(copy, tmp_path)
    assert "results.json" not in sent and b"No results were measured on these weights." in sent["README.md"]


def test_an_image_that_is_none_is_refused(copy, tmp_path):
    write(copy / "README.md", "---\nlicense: mit\n---\n![a](id_rsa.png)")
    write(copy / "id_rsa.png", SECRET.decode())
    with pytest.raises(PublishError, match="id_rsa.png, which README.md shows, is no image"):
        staged(copy, tmp_path)


def _with_text(file: Path, text: str) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Comment", text)
    Image.new("RGB", (4, 4)).save(file, pnginfo=chunks)


def _with_place(file: Path) -> None:
    exif = Image.Exif()
    exif[0x8825] = {1: "N"}
    Image.new("RGB", (4, 4)).save(file, exif=exif)


@pytest.mark.parametrize(
    "make",
    [
        lambda file: _with_text(file, "made in /home/alice/secret-project"),
        lambda file: _with_text(file, HF_TOKEN),
        _with_place,
    ],
    ids=["a path", "a token", "a place"],
)
def test_an_image_whose_metadata_are_private_is_refused(copy, tmp_path, make):
    write(copy / "README.md", "---\nlicense: mit\n---\n![a](plot.png)")
    make(copy / "plot.png")
    with pytest.raises(PublishError, match="plot.png, which README.md shows, says in its metadata"):
        staged(copy, tmp_path)


def test_other_metadata_of_images_are_sent(copy, tmp_path):
    write(copy / "README.md", "---\nlicense: mit\n---\n![a](plot.png)")
    _with_text(copy / "plot.png", "Matplotlib version 3.10.0, https://matplotlib.org/")
    assert "plot.png" in staged(copy, tmp_path)
