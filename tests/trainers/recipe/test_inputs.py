"""A step goes on, or counts as finished, only with the files that it was begun with."""

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.hub_server import TOKEN, hub_server
from tests.trainers.tiny_recipe import Interrupted, die_in_stage, interrupt, settings, write_parts, write_recipe
from trainers.data import PairSource
from trainers.recipe.curriculum import Curriculum
from trainers.recipe.files import RecipeError
from trainers.recipe.inputs import describe_data
from trainers.recipe.progress import _changes
from trainers.recipe.schema import load_recipe


STEPS = ("preparation", "inheritance", "contrastive_tuning")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with `recipe.yaml`, all that it reads, and what a run wrote that ended in the middle of stage 2."""
    folder = tmp_path_factory.mktemp("begun")
    write_parts(folder)
    recipe = write_recipe(folder / "recipe.yaml", settings(folder))
    curriculum = Curriculum(load_recipe(recipe))
    die_in_stage(curriculum, "contrastive_tuning", 3, interrupt)
    with pytest.raises(Interrupted):
        curriculum.run()
    return folder


def states(folder: Path) -> list[str]:
    curriculum = Curriculum(load_recipe(folder / "recipe.yaml"))
    return [curriculum.state_of(step) for step in STEPS]


def other_images(file: Path) -> None:
    rows, pixels = datasets.Dataset.from_parquet(str(file)).to_list(), np.random.default_rng(5)
    for row in rows:
        row["image"] = Image.fromarray(pixels.integers(0, 256, (10, 12, 3), dtype=np.uint8))
    datasets.Dataset.from_list(rows).to_parquet(file)


def fewer_rows(file: Path) -> None:
    rows = datasets.Dataset.from_parquet(str(file)).select(range(16))
    rows.to_parquet(file.with_suffix(".new"))
    os.replace(file.with_suffix(".new"), file)


def exchanged_captions(file: Path) -> None:
    """The same bytes in another order, with the same time of modification: what `rsync -t` can leave."""
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[::-1]))


def other_weights(file: Path) -> None:
    tensors = {name: value + 0.1 if value.is_floating_point() else value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def other_json(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"changed": True}))


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "pairs.parquet",
            other_images,
            "preparation was finished with other files: data.train has changed: it was 1 ",
        ),
        ("pairs.parquet", fewer_rows, "preparation was finished with other files: data.train has changed"),
        ("texts.jsonl", exchanged_captions, "preparation was finished with other files: data.texts has changed"),
        ("llm/model.safetensors", other_weights, "model.text has changed: model.safetensors. Put them back"),
        ("llm/config.json", other_json, "model.text has changed: config.json"),
        ("llm/tokenizer.json", Path.unlink, "model.text has changed: tokenizer.json"),
        (
            "clip/model.safetensors",
            other_weights,
            "model.vision has changed: model.safetensors; model.image_processor",
        ),
        (
            "out/inheritance/model/model.safetensors",
            other_weights,
            "inheritance was changed after it was finished: model has changed: model.safetensors",
        ),
        ("out/preparation/model/config.json", other_json, "preparation was changed after it was finished"),
    ],
)
def test_a_file_that_changed_is_named(begun, name, change, message):
    file = begun / name
    before, status = file.read_bytes(), file.stat()
    change(file)
    if file.exists():
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    try:
        with pytest.raises(RecipeError, match=message):
            Curriculum(load_recipe(begun / "recipe.yaml")).run()
    finally:
        file.write_bytes(before)
    assert states(begun) == ["finished", "finished", "begun"]  # the same bytes are the same file, whatever its time


def test_a_stage_that_is_run_anew_does_not_change_under_the_next_one(begun, tmp_path):
    (begun / "out" / "inheritance").rename(tmp_path / "inheritance")
    with pytest.raises(
        RecipeError, match="contrastive_tuning was begun with other files: inheritance/model was .* and is missing"
    ):
        states(begun)
    (tmp_path / "inheritance").rename(begun / "out" / "inheritance")


def test_a_text_store_of_another_encoder_is_refused(begun):
    file = begun / "out" / "text-stores" / "teacher" / "store.json"
    before = file.read_text()
    content = json.loads(before)
    content["fingerprint"]["config"]["text_config"]["hidden_act"] = "gelu"
    file.write_text(json.dumps(content))
    try:
        with pytest.raises(
            RecipeError, match="inheritance was finished with other files: text_stores.teacher has changed"
        ):
            states(begun)
    finally:
        file.write_text(before)


def test_what_an_earlier_release_began_goes_on_with_a_warning(begun, caplog):
    file = begun / "out" / "contrastive_tuning" / "started.json"
    before = file.read_text()
    record = json.loads(before)
    del record["inputs"]
    file.write_text(json.dumps(record))
    assert states(begun) == ["finished", "finished", "begun"]
    assert "was begun by an earlier release, which recorded no hashes" in caplog.text
    file.write_text(before)


@pytest.mark.parametrize("content", ["", "[1]", '{"recipe": ', "[" * 100_000])
def test_a_damaged_record_is_named(begun, content):
    file = begun / "out" / "inheritance" / "complete.json"
    before = file.read_text()
    file.write_text(content)
    with pytest.raises(
        RecipeError, match=r"inheritance/complete.json is damaged \(.*\): delete .*inheritance to run the step anew$"
    ):
        states(begun)
    file.write_text(before)


def test_other_versions_are_noted(begun, caplog, monkeypatch):
    now = {"torch": "9.9"}
    monkeypatch.setattr("trainers.recipe.curriculum.versions", lambda: now)
    curriculum = Curriculum(load_recipe(begun / "recipe.yaml"))
    curriculum._begin("contrastive_tuning")
    assert "contrastive_tuning was begun with" in caplog.text and "is resumed with torch 9.9" in caplog.text


def test_images_that_a_table_names_count_where_they_are_read(tmp_path):
    table, image = tmp_path / "pairs.jsonl", tmp_path / "images" / "0.png"
    image.parent.mkdir()
    Image.new("RGB", (8, 8)).save(image)
    table.write_text('{"image": "images/0.png", "text": "black"}\n{"image": null, "text": "nothing"}\n')
    source = PairSource(source=str(table))
    both = describe_data(source, images=True)
    captions = describe_data(source, images=False)
    assert (both["files"], captions["files"]) == (2, 1)
    Image.new("RGB", (8, 8), "red").save(image)
    assert describe_data(source, images=True) != both
    assert describe_data(source, images=False) == captions


def test_images_in_a_folder_of_their_own_count(tmp_path):
    for folder in ("tables", "images"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0.png")
    (tmp_path / "tables" / "pairs.jsonl").write_text('{"image": "0.png", "text": "black"}\n')
    source = PairSource(source=str(tmp_path / "tables"), image_folder=str(tmp_path / "images"))
    before = describe_data(source, images=True)
    assert (before["files"], describe_data(source, images=False)["files"]) == (2, 1)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "0.png")
    assert describe_data(source, images=True) != before


@pytest.mark.parametrize("source", ["", "*.tar", "a.tar"])
def test_folders_patterns_and_files_count_by_content_and_name(tmp_path, source):
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").write_bytes(name.encode())
    here = PairSource(source=str(tmp_path / source))
    before = describe_data(here, images=True)
    assert before["files"] == before["bytes"] == (1 if source == "a.tar" else 2)
    (tmp_path / ".DS_Store").write_bytes(b"written by who looks into the folder")
    assert describe_data(here, images=True) == before
    (tmp_path / "a.tar").write_bytes(b"c")
    assert describe_data(here, images=True)["sha256"] != before["sha256"]


def test_held_out_captions_that_change_are_embedded(tmp_path):
    write_parts(tmp_path)
    content = settings(tmp_path)
    held_out = tmp_path / "held-out.jsonl"
    rows = [{"image": "0.png", "text": f"held out {i}"} for i in range(4)]
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content["data"]["eval"] = {"source": str(held_out)}
    for stage in content["stages"].values():
        stage |= {"eval_strategy": "epoch", "max_steps": 3}
    recipe = write_recipe(tmp_path / "recipe.yaml", content)
    Curriculum(load_recipe(recipe)).run("inheritance")
    held_out.write_text("".join(json.dumps({**row, "text": row["text"] + " anew"}) + "\n" for row in rows))
    preparation = tmp_path / "out" / "preparation" / "model" / "model.safetensors"
    before = preparation.stat().st_mtime_ns
    Curriculum(load_recipe(recipe)).run()
    assert preparation.stat().st_mtime_ns == before
    tuned = json.loads((tmp_path / "out" / "contrastive_tuning" / "complete.json").read_text())
    assert "eval_i2t_r@1" in tuned["last_evaluation"]


def test_what_is_on_the_hub_stays_at_the_commit_of_the_first_run(tmp_path, monkeypatch):
    write_parts(tmp_path)
    with hub_server(tmp_path / "server") as hub:
        hub.patch(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        api = HfApi(endpoint=hub.url, token=TOKEN)
        api.create_repo("alice/clip")
        api.upload_folder(repo_id="alice/clip", folder_path=tmp_path / "clip")
        first = api.model_info("alice/clip").sha
        content = settings(tmp_path)
        content["model"]["vision"] = "alice/clip"
        recipe = write_recipe(tmp_path / "recipe.yaml", content)
        Curriculum(load_recipe(recipe)).run("inheritance")

        other_weights(tmp_path / "clip" / "model.safetensors")
        api.upload_folder(repo_id="alice/clip", folder_path=tmp_path / "clip")
        assert api.model_info("alice/clip").sha != first
        curriculum = Curriculum(load_recipe(recipe))
        curriculum.run()
    assert [curriculum.recipe.model.place_of(part) for part in ("vision", "teacher", "image_processor")] == [
        ("alice/clip", first)
    ] * 3
    record = json.loads((tmp_path / "out" / "preparation" / "complete.json").read_text())
    assert record["inputs"]["model.vision"] == {"commit": first}
    resolved = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert resolved.model.vision_revision == resolved.model.teacher_revision == first


def test_a_model_that_is_nowhere_is_named_before_anything_is_written(tmp_path):
    write_parts(tmp_path)
    content = settings(tmp_path)
    content["model"]["text"] = "models/my-llm"
    with pytest.raises(
        RecipeError, match="^model.text: there is no folder models/my-llm, and on the Hub it cannot be found: "
    ):
        Curriculum(load_recipe(write_recipe(tmp_path / "recipe.yaml", content))).run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_data_set_on_the_hub_is_read_at_its_commit(tmp_path, monkeypatch):
    write_parts(tmp_path)
    commits = {"data.train": {"name": "alice/pairs", "revision": "main", "commit": "c" * 40}}
    content = settings(tmp_path)
    content["data"]["train"] = {"source": "alice/pairs"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "commits.json").write_text(json.dumps(commits))
    curriculum = Curriculum(load_recipe(write_recipe(tmp_path / "recipe.yaml", content)))
    assert curriculum.recipe.data.train.revision == "c" * 40
    assert curriculum.inputs_of("contrastive_tuning")["data.train"] == {"commit": "c" * 40}


def test_finite_weights_of_a_finished_run(begun):
    """The changes above left nothing behind: the interrupted run ends well."""
    Curriculum(load_recipe(begun / "recipe.yaml")).run()
    tensors = load_file(begun / "out" / "contrastive_tuning" / "model" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert states(begun) == ["finished"] * 3


def test_a_setting_that_an_earlier_release_did_not_have_is_no_change_while_it_is_off():
    before = {"data": {"train": {"source": "a", "split": "train"}}}
    now = {"data": {"train": {"source": "a", "split": "train", "remote_images": False, "image_folder": None}}}
    assert list(_changes(before, now)) == []
    now["data"]["train"]["remote_images"] = True
    assert list(_changes(before, now)) == ["data.train.remote_images was None and is True"]
