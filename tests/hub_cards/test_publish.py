"""`publish`, against a stand-in Hub by the real client: what is sent, what is foretold, and what happens when something fails."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaConfig, LlamaModel
from typer.testing import CliRunner

from hub_cards import model_card
from hub_cards.publish import publish
from hub_cards.staging import PublishError
from modeling_proclip import ProCLIPModel
from tests.environments import REPOSITORY
from tests.hub_cards.test_model_card import RESULTS
from tests.hub_server import READ_TOKEN, TOKEN, HubServer, hub_server
from tests.modeling_proclip import tiny
from trainers.cli import app
from trainers.evaluation.encoders import Encoder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A full checkpoint, its processor, and what lies around in such folders."""
    folder = tmp_path_factory.mktemp("checkpoint") / "my-proclip"
    tiny.model().save_pretrained(folder)
    tiny.processor(prompt_template=tiny.LLAMA3, max_length=40).save_pretrained(folder)
    for name in ("optimizer.pt", "training_args.bin", ".env", "store.lock", "modeling_other.py", "runs/events.1"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("HF_TOKEN=hf_" + "x" * 34)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "my-proclip")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> HubServer:
    with hub_server(tmp_path / "blobs") as server:
        server.patch(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def run(*arguments: str | Path):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["publish", *map(str, arguments)])


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# What is sent


def test_dry_run_foretells_every_byte_and_asks_the_hub_nothing(checkpoint, hub):
    foretold = publish(checkpoint, "alice/my-proclip", dry_run=True)
    assert not hub.requests and foretold.commit is None
    sent = publish(checkpoint, "alice/my-proclip")
    assert sent.files == foretold.files and sent.left_out == foretold.left_out
    arrived = {name: blob.size for name, blob in hub.files("alice/my-proclip").items() if name != ".gitattributes"}
    assert arrived == foretold.files
    assert hub.bytes_received("^/lfs/") == foretold.files["model.safetensors"]
    assert hub.repositories["model", "alice/my-proclip"].branches["main"] == sent.commit


def test_only_a_checkpoint_s_own_files_are_sent(checkpoint, hub):
    report = publish(checkpoint, "my-proclip")  # a name alone is the user's own
    names = set(hub.files("alice/my-proclip"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "README.md"} <= names
    assert report.left_out == [
        ".env",
        "modeling_other.py",
        "optimizer.pt",
        "runs/events.1",
        "store.lock",
        "training_args.bin",
    ]
    assert not names & set(report.left_out)
    code = {name for name in names if name.endswith(".py")}
    assert code >= {"configuration_proclip.py", "modeling_proclip.py", "processing_proclip.py", "modeling_eva_clip.py"}
    assert not [name for name in code if "convert" in name]


def test_weights_that_the_hub_has_are_not_sent_again(checkpoint, hub):
    first = publish(checkpoint, "alice/x")
    before = hub.bytes_received("^/lfs/")
    again = publish(checkpoint, "alice/x")
    assert again.commit == first.commit and hub.bytes_received("^/lfs/") == before
    publish(checkpoint, "alice/other")
    assert hub.bytes_received("^/lfs/") == before  # one store for all repositories


def test_no_weights_of_an_earlier_state_stay(checkpoint, hub, tmp_path):
    publish(checkpoint, "alice/x")
    shards = publish(checkpoint, "alice/x", max_shard_size="60KB")
    assert shards.removed == ["model.safetensors"] and "model.safetensors.index.json" in hub.files("alice/x")
    names = [name for name in hub.files("alice/x") if name.endswith(".safetensors")]
    assert len(names) > 2 and all(hub.files("alice/x")[name].size < 66_000 for name in names)
    fetched = snapshot_download("alice/x", local_dir=tmp_path / "fetched")
    ours, theirs = AutoModel.from_pretrained(checkpoint).state_dict(), AutoModel.from_pretrained(fetched).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    whole = publish(checkpoint, "alice/x", with_code=False)
    assert set(names) < set(whole.removed) and "modeling_proclip.py" in whole.removed
    assert "auto_map" not in json.loads(hub.read("alice/x", "config.json"))


def test_private_unless_told_otherwise(checkpoint, hub):
    publish(checkpoint, "alice/mine")
    publish(checkpoint, "alice/ours", private=False)
    assert hub.repositories["model", "alice/mine"].private and not hub.repositories["model", "alice/ours"].private
    sent = hub.bytes_received("commit")
    with pytest.raises(PublishError, match="alice/ours is there and public, so all could see.*--public"):
        publish(checkpoint, "alice/ours")
    with pytest.raises(
        PublishError, match="alice/mine is there and private, and sending to it would not make it public"
    ):
        publish(checkpoint, "alice/mine", private=False)
    assert hub.bytes_received("commit") == sent


def test_branch_and_message(checkpoint, hub):
    publish(checkpoint, "alice/x", revision="v2", message="the second try")
    repository = hub.repositories["model", "alice/x"]
    assert list(hub.files("alice/x")) == [".gitattributes"] and "config.json" in hub.files("alice/x", "v2")
    assert repository.find("v2").message == "the second try"


def test_card_of_the_folder_is_sent_with_its_pictures_and_the_repository_s_name(copy, hub):
    text = "---\nlicense: mit\n---\n![a](images/a.png) [b](../secret.png) [c](.env)\nfrom_pretrained('path/of/this/folder')"
    (copy / "README.md").write_text(text)
    (copy / "images").mkdir()
    (copy / "images" / "a.png").write_bytes(b"a picture")
    (copy.parent / "secret.png").write_bytes(b"another")
    publish(copy, "alice/x")
    assert hub.read("alice/x", "README.md").decode() == text.replace("path/of/this/folder", "alice/x")
    assert hub.read("alice/x", "images/a.png") == b"a picture"
    assert not [name for name in hub.files("alice/x") if "secret" in name or "env" in name]


def test_card_says_what_it_is_told_and_what_was_measured(copy, hub, tmp_path):
    identity = Encoder.load(copy, "cpu", "auto").identity()
    for name, weights in (("mine", identity), ("other", {**identity, "own_weights_sha256": "0" * 64})):
        (copy / name).mkdir()
        (copy / name / "results.json").write_text(json.dumps({**RESULTS, "model": weights}))
    (copy / "README.md").write_text("an older card")
    told = tmp_path / "card.yaml"
    told.write_text("license: mit\nlanguages: [en]\ndatasets: {owner/pictures: cc-by-4.0}\nlimits: [It is tiny.]\n")
    for lean in ((), ("--dry-run",)):
        result = run(copy, "alice/x", "--card", told, *lean)
        assert result.exit_code == 0, result.output
    card = ModelCard(hub.read("alice/x", "README.md").decode())
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", ["en"], ["owner/pictures"])
    assert "- It is tiny." in card.text and "trust_remote_code=True" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [0.71234567, 0.8123, 0.5, 0.75]
    told.write_text("licence: mit\n")
    assert "licence" in run(copy, "alice/x", "--card", told).output
    told.write_text(f"results: [{copy / 'other'}]\n")
    assert "other weights" in run(copy, "alice/x", "--card", told).output
    told.write_text("just words\n")
    assert "no keys and values" in run(copy, "alice/x", "--card", told).output


def test_a_card_that_nobody_touched_is_rendered_anew(copy, hub):
    model_card(copy).save(copy / "README.md")
    (copy / "results.json").write_text(json.dumps(RESULTS))
    publish(copy, "alice/x")
    card = hub.read("alice/x", "README.md").decode()
    assert "trust_remote_code=True" in card and "0.7123" in card and "import modeling_proclip" not in card
    for touched in (str(model_card(copy)).replace("# my-proclip", "# Mine"), str(model_card(copy, license="mit"))):
        (copy / "README.md").write_text(touched)
        publish(copy, "alice/y")
        assert hub.read("alice/y", "README.md").decode() == touched.replace("path/of/this/folder", "alice/y")


def test_card_is_rendered_where_there_is_none(checkpoint, hub):
    publish(checkpoint, "x")
    card = ModelCard(hub.read("alice/x", "README.md").decode())
    assert card.data.library_name == "transformers"
    assert 'AutoModel.from_pretrained("alice/x", trust_remote_code=True)' in card.text


def test_no_folder_of_this_machine_is_named(copy, hub):
    vision = {**json.loads((copy / "config.json").read_text())["vision_config"], "_name_or_path": "/home/alice/clip"}
    names = {"text_model_name_or_path": str(copy), "vision_model_name_or_path": "/home/alice/clip"}
    edit(copy / "config.json", vision_config=vision, **names)
    publish(copy, "alice/x")
    assert str(copy.parent) not in "".join(
        hub.read("alice/x", name).decode() for name in hub.files("alice/x") if name.endswith((".json", ".md"))
    )
    assert "/home/alice" not in hub.read("alice/x", "config.json").decode()


# Lean and full


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
    foretold = publish(full, "alice/x", lean=True, text_model=llm, dry_run=True)
    before = hub.bytes_received("^/lfs/")
    report = publish(full, "alice/x", lean=True, text_model=llm)
    own = {name: tensor for name, tensor in pair.state_dict().items() if not name.startswith("text_model.")}
    size = sum(tensor.numel() * tensor.element_size() for tensor in own.values())
    sent = hub.bytes_received("^/lfs/") - before
    assert size < sent == foretold.files["model.safetensors"] == report.files["model.safetensors"] < size + 6_000
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
    foretold = publish(lean, "alice/x", lean=False, dry_run=True)
    report = publish(lean, "alice/x", lean=False)
    assert report.notes == ["README.md is sent as it is: see that it says nothing of the LLM that is no longer so."]
    assert report.files == foretold.files and not report.lean and report.text_model_bytes == 0
    state = load_file(hub.blob_path(hub.files("alice/x")["model.safetensors"].sha256))
    ours = pair.state_dict()
    assert state.keys() == ours.keys() and all(torch.equal(state[name], ours[name]) for name in ours)


def test_lean_needs_an_llm_that_others_can_find(pair, llm, hub, tmp_path):
    lean = save(pair, tmp_path / "lean", lean=True)
    with pytest.raises(PublishError, match="names a folder of this machine, '.*llm'. Name the same LLM on the Hub"):
        publish(lean, "alice/x")
    with pytest.raises(PublishError, match="'llm' is no name on the Hub"):
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
    """The benchmark with a small image encoder and a short adapter; docs/hub.md has its numbers for ViT-L/14."""
    measure = runpy.run_path(str(REPOSITORY / "benchmarks" / "publish.py"))["measure"]
    found = measure("tiny", adapter_num_layers=0)
    assert found["arrived"] == found["foretold"]
    assert found["tensors"] < found["weights sent"] < found["tensors"] + 10_000
    assert found["second publish, weights"] == 0
    parameters = 8_030_261_248 - 128_256 * 4_096  # Llama-3-8B's, without its head
    assert found["the LLM, named"] == 2 * parameters
    assert 2 * parameters < found["full, foretold"] - found["weights sent"] < 2 * parameters + 200_000


# From memory


def test_model_and_processor_push_the_same_repository(checkpoint, hub):
    model, processor = tiny.model(), tiny.processor(prompt_template=tiny.LLAMA3, max_length=40)
    publish(checkpoint, "alice/folder")
    expected = set(hub.files("alice/folder"))
    assert model.push_to_hub("alice/together", processor=processor).repo_id == "alice/together"
    assert set(hub.files("alice/together")) == expected and hub.repositories["model", "alice/together"].private
    model.push_to_hub("apart", commit_message="model", max_shard_size="1GB")
    processor.push_to_hub("apart", commit_message="processor")
    assert set(hub.files("alice/apart")) == expected
    processor.push_to_hub("reverse")
    model.push_to_hub("reverse")
    assert set(hub.files("alice/reverse")) == expected
    for name in expected - {"README.md", ".gitattributes"}:
        assert hub.read("alice/apart", name) == hub.read("alice/folder", name), name


def test_a_model_without_its_processor_says_so(hub, caplog):
    tiny.model().push_to_hub("alice/x")
    assert "alice/x has no processor yet: processor.push_to_hub('alice/x') sends it" in caplog.text


# What is refused, before anything is sent


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
    "damaged processor": (lambda f: (f / "processor_config.json").write_text("{"), "processor does not load"),
    "pictures of another size": (
        lambda f: edit(
            f / "processor_config.json",
            image_processor={
                **json.loads((f / "processor_config.json").read_text())["image_processor"],
                "crop_size": 24,
            },
        ),
        "makes pictures of 24 pixels, and the image encoder takes 16",
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


# What goes wrong on the way


@pytest.mark.parametrize(
    "token, repo_id, message",
    [
        ("hf_" + "W" * 34, "alice/x", r"does not know your token.*hf auth login"),
        (None, "alice/x", r"does not know your token, or there is none \(401\)"),
        (TOKEN, "bob/x", r"may not write to bob/x \(403: You don't have the rights"),
        (READ_TOKEN, "alice/x", r"may not write to alice/x \(403: Your token may only read"),
    ],
)
def test_who_may_not_write_is_told_what_to_do(checkpoint, hub, tmp_path, monkeypatch, token, repo_id, message):
    hub.patch(monkeypatch, tmp_path / "other", token)
    with pytest.raises(PublishError, match=message) as caught:
        publish(checkpoint, repo_id)
    result = run(checkpoint, repo_id)
    *plan, error = result.stderr.splitlines()
    assert result.exit_code == 1 and error.startswith("error: ") and len(plan) <= 1
    assert "hf_W" not in str(caught.value) + result.output and READ_TOKEN not in str(caught.value) + result.output
    assert hub.repositories == {}


@pytest.mark.parametrize(
    "status, message",
    [
        (409, r"Somebody else changed alice/x meanwhile \(409"),
        (412, r"Somebody else changed alice/x meanwhile \(412"),
        (429, r"asks for fewer requests \(429.*same command again"),
        (500, r"The Hub failed \(500.*same command again"),
        (503, r"The Hub failed \(503.*not sent twice"),
        (418, r"The Hub refuses alice/x \(418: said the stand-in\)"),
    ],
)
def test_a_commit_that_fails_leaves_nothing_and_the_next_run_sends_no_weights(checkpoint, hub, status, message):
    fault = hub.fail("POST", "/commit/", status)
    fault.message = f"said the stand-in, token {TOKEN}" if status == 500 else fault.message
    with pytest.raises(PublishError, match=message) as caught:
        publish(checkpoint, "alice/x")
    assert TOKEN not in str(caught.value)
    assert list(hub.files("alice/x")) == [".gitattributes"]  # no half repository
    sent = hub.bytes_received("^/lfs/")
    report = publish(checkpoint, "alice/x")
    assert hub.bytes_received("^/lfs/") == sent == report.files["model.safetensors"]
    assert "README.md" in hub.files("alice/x")


def test_somebody_else_s_commit_is_not_overwritten(checkpoint, hub, monkeypatch):
    publish(checkpoint, "alice/x")
    model_info = HfApi.model_info

    def and_then_somebody_commits(self, *args, **kwargs):
        info = model_info(self, *args, **kwargs)
        repository = hub.repositories["model", "alice/x"]
        repository.commit("main", "somebody else's", {**repository.find("main").files, "news.txt": hub.store(b"news")})
        return info

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", and_then_somebody_commits)
    with pytest.raises(PublishError, match="Somebody else changed alice/x meanwhile"):
        publish(checkpoint, "alice/x", max_shard_size="60KB")
    assert "news.txt" in hub.files("alice/x") and "model.safetensors" in hub.files("alice/x")


def test_a_dropped_upload_is_tried_again_by_itself(checkpoint, hub, no_waiting):
    hub.drop("PUT", "^/lfs/", after=100_000)
    hub.fail("PUT", "^/lfs/", 503)
    report = publish(checkpoint, "alice/x")
    size = report.files["model.safetensors"]
    assert hub.bytes_received("^/lfs/") == 100_000 + 2 * size  # cut, refused when it was whole, taken
    assert hub.files("alice/x")["model.safetensors"].size == size


def test_a_line_that_stays_down_ends_in_one_error_and_other_files_are_not_sent_again(checkpoint, hub, no_waiting):
    publish(checkpoint, "alice/shards", max_shard_size="60KB")
    shards = [blob for name, blob in hub.files("alice/shards").items() if name.endswith(".safetensors")]
    for blob in shards:
        hub.blob_path(blob.sha256).unlink()
    hub.drop("PUT", f"^/lfs/{shards[0].sha256}", after=1_000, times=6)  # the client tries a file six times
    hub.requests.clear()
    with pytest.raises(PublishError, match="cannot be reached or hung up.*not sent twice"):
        publish(checkpoint, "alice/x", max_shard_size="60KB")
    assert hub.bytes_received("^/lfs/") == 6 * 1_000 + sum(blob.size for blob in shards[1:])
    hub.requests.clear()
    publish(checkpoint, "alice/x", max_shard_size="60KB")
    assert hub.bytes_received("^/lfs/") == shards[0].size


def test_parts_of_a_large_file(checkpoint, hub, no_waiting):
    hub.part_size = 50_000
    hub.fail("PUT", r"/lfs/\w+/2", 502)
    hub.drop("PUT", r"/lfs/\w+/4", after=7_000)
    report = publish(checkpoint, "alice/x")
    size = report.files["model.safetensors"]
    assert hub.bytes_received(r"^/lfs/\w+/") == size + 50_000 + 7_000 + hub.bytes_received("^/lfs/complete")
    assert hub.read("alice/x", "model.safetensors") == (checkpoint / "model.safetensors").read_bytes()


def test_a_download_that_is_cut_goes_on_where_it_was(checkpoint, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)  # what the client keeps; 10 MB else
    report = publish(checkpoint, "alice/x")
    hub.drop("GET", "/model.safetensors", after=100_000)
    hub.fail("GET", "/tokenizer.json", 429, Retry_After="0")
    folder = Path(snapshot_download("alice/x", revision=report.commit))
    assert hub.bytes_sent("/model.safetensors") == report.files["model.safetensors"]  # not a byte twice
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert torch.equal(
        AutoModel.from_pretrained(folder).logit_scale, AutoModel.from_pretrained(checkpoint).logit_scale
    )
    hub.patch(monkeypatch, tmp_path / "stranger", token=None)
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("alice/x", local_dir=tmp_path / "seen")  # it is private


def test_nobody_there(checkpoint, hub, monkeypatch, no_waiting):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PublishError, match="The Hub at http://127.0.0.1:9 cannot be reached"):
        publish(checkpoint, "alice/x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE is set, so nothing can be sent"):
        publish(checkpoint, "alice/x")


def test_full_disk(checkpoint, hub, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hub_cards.staging.write_tensors", full)
    with pytest.raises(PublishError, match="has no space left for the weights"):
        publish(checkpoint, "alice/x", max_shard_size="60KB")
    assert not list(checkpoint.parent.glob(".*publish*")) and hub.repositories == {}


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_interrupted_in_the_middle_the_next_run_finishes(checkpoint, hub, tmp_path, number, code):
    sketch = publish(checkpoint, "alice/x", max_shard_size="100KB", dry_run=True)
    shards = [name for name in sketch.files if name.endswith(".safetensors")]
    stalled = hub.stall("PUT", "^/lfs/", after=20_000)
    command = [sys.executable, "-m", "trainers.cli", "publish", checkpoint, "alice/x", "--max-shard-size", "100KB"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert stalled.reached.wait(60)
        while hub.count("PUT", "^/lfs/") < len(shards) - 1:  # the others arrive
            assert process.poll() is None
        os.kill(process.pid, number)
        if number == signal.SIGINT:
            stalled.release.set()  # the client lets the files that are on their way go on
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        stalled.release.set()
    assert process.returncode == code
    assert TOKEN not in errors and (number == signal.SIGKILL or errors.strip().endswith("interrupted"))
    assert list(hub.files("alice/x")) == [".gitattributes"]
    arrived = [r.num_bytes for r in hub.requests if r.path.startswith("/lfs/") and r.status == 200]
    hub.requests.clear()
    publish(checkpoint, "alice/x", max_shard_size="100KB")
    assert hub.bytes_received("^/lfs/") == sum(sketch.files[name] for name in shards) - sum(arrived)
    assert not list(checkpoint.parent.glob(".*publish*"))  # what the killed run had written is gone


# The command


def test_command(checkpoint, hub):
    foretold = run(checkpoint, "alice/x", "--public", "--dry-run")
    assert foretold.exit_code == 0, foretold.output
    assert "would send model.safetensors" in foretold.output and "optimizer.pt" in foretold.output
    assert hub.repositories == {}
    options = ("--public", "--revision", "dev", "--message", "hello", "--max-shard-size", "100KB", "--no-code")
    result = run(checkpoint, "x", *options)
    assert result.exit_code == 0, result.output
    repository = hub.repositories["model", "alice/x"]
    assert not repository.private and repository.find("dev").message == "hello"
    assert "model-00001-of-00003.safetensors" in hub.files("alice/x", "dev")
    assert not [name for name in hub.files("alice/x", "dev") if name.endswith(".py")]
    assert repository.branches["dev"] in result.output and TOKEN not in result.output
    assert "sending 2" in result.stderr and "bytes to alice/x" in result.stderr  # before it is sent
    assert run(checkpoint, "x", "--max-shard-size", "lots").exit_code == 1
