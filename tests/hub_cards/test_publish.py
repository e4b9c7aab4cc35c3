"""`publish`, against a stand-in Hub by the real client: what is sent, and what is estimate."""

import json

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from PIL import Image
from transformers import AutoModel

from hub_cards import model_card
from hub_cards.publish import publish
from hub_cards.staging import PublishError
from tests.hub_cards.publishing import edit, run
from tests.hub_cards.test_model_card import RESULTS
from tests.hub_server import TOKEN
from tests.modeling_proclip import tiny
from trainers.evaluation.scoring.encoders import Encoder


def test_dry_run_estimates_every_byte_and_asks_the_hub_nothing(checkpoint, hub):
    estimate = publish(checkpoint, "alice/my-proclip", dry_run=True)
    assert not hub.requests and estimate.commit is None
    sent = publish(checkpoint, "alice/my-proclip")
    assert sent.files == estimate.files and sent.left_out == estimate.left_out
    arrived = {name: blob.size for name, blob in hub.files("alice/my-proclip").items() if name != ".gitattributes"}
    assert arrived == estimate.files
    assert hub.bytes_received("^/lfs/") == estimate.files["model.safetensors"]
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
    Image.new("RGB", (4, 4)).save(copy / "images" / "a.png")
    (copy.parent / "secret.png").write_bytes(b"another")
    publish(copy, "alice/x")
    assert hub.read("alice/x", "README.md").decode() == text.replace("path/of/this/folder", "alice/x")
    assert hub.read("alice/x", "images/a.png") == (copy / "images" / "a.png").read_bytes()
    assert not [name for name in hub.files("alice/x") if "secret" in name or "env" in name]


def test_card_says_what_its_file_says_and_what_was_measured(copy, hub, tmp_path):
    identity = Encoder.load(copy, "cpu", "stored").identity()
    for name, weights in (("mine", identity), ("other", {**identity, "own_weights_sha256": "0" * 64})):
        (copy / name).mkdir()
        (copy / name / "results.json").write_text(json.dumps({**RESULTS, "model": weights}))
    (copy / "README.md").write_text("an older card")
    details = tmp_path / "card.yaml"
    details.write_text("license: mit\nlanguages: [en]\ndatasets: {owner/pictures: cc-by-4.0}\nlimits: [It is tiny.]\n")
    for lean in ((), ("--dry-run",)):
        result = run(copy, "alice/x", "--card", details, *lean)
        assert result.exit_code == 0, result.output
    card = ModelCard(hub.read("alice/x", "README.md").decode())
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", ["en"], ["owner/pictures"])
    assert "- It is tiny." in card.text and "trust_remote_code=True" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [0.71234567, 0.8123, 0.5, 0.75]
    details.write_text("licence: mit\n")
    assert "licence" in run(copy, "alice/x", "--card", details).output
    details.write_text(f"results: [{copy / 'other'}]\n")
    assert "other weights" in run(copy, "alice/x", "--card", details).output
    details.write_text("just words\n")
    assert "no keys and values" in run(copy, "alice/x", "--card", details).output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("license: [mit", "card.yaml, line 1: "),
        ("licence: mit", "card.yaml: licence: unknown key; did you mean 'license'?"),
        ("limits: It is tiny.", "card.yaml: limits: must be a list, got the text 'It is tiny.'"),
        ("languages: {en: 1}", "card.yaml: languages: must be a list"),
        ("datasets: [owner/images]", "card.yaml: datasets: must be a mapping"),
        ("a: &a [x, x]\nb: [*a, *a]\n", "card.yaml, line 2: *a is an alias"),
        ("[" * 100_000, "card.yaml, line 1: it is nested more than 50 levels deep"),
        ("license: apache", "license 'apache' is none of the Hub's identifiers"),
        ("base_models: {images: a/b}", "base_models has no key 'images'"),
        ("results: [nowhere]", "nowhere is missing"),
    ],
)
def test_a_card_file_that_is_wrong_ends_in_one_line(copy, hub, tmp_path, text, message):
    (tmp_path / "card.yaml").write_text(text)
    result = run(copy, "alice/x", "--card", tmp_path / "card.yaml", "--dry-run")
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1


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


# The command


def test_command(checkpoint, hub):
    estimate = run(checkpoint, "alice/x", "--public", "--dry-run")
    assert estimate.exit_code == 0, estimate.output
    assert "would send model.safetensors" in estimate.output and "optimizer.pt" in estimate.output
    assert hub.repositories == {}
    options = ("--public", "--revision", "dev", "--message", "hello", "--max-shard-size", "100KB", "--no-code")
    result = run(checkpoint, "x", *options)
    assert result.exit_code == 0, result.output
    repository = hub.repositories["model", "alice/x"]
    assert not repository.private and repository.find("dev").message == "hello"
    assert "model-00001-of-00003.safetensors" in hub.files("alice/x", "dev")
    assert not [name for name in hub.files("alice/x", "dev") if name.endswith(".py")]
    assert repository.branches["dev"] in result.output and TOKEN not in result.output
    assert "sending 2" in result.stderr and "bytes to alice/x: 1_Normalize/config.json, README.md" in result.stderr
    assert "max_shard_size 'lots' is not a size: give" in run(checkpoint, "x", "--max-shard-size", "lots").stderr
