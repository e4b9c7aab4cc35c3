"""A recipe in an object store that reads everything from there: the result of the same files here, and changes are noticed."""

import json

import pytest
from typer.testing import CliRunner

from tests.object_server import SECRET
from tests.trainers.recipe.test_curriculum import assert_same_weights
from tests.trainers.tiny_recipe import settings, write_parts
from trainers.cli import app
from trainers.recipe.curriculum import Curriculum
from trainers.recipe.files import RecipeError, read_recipe
from trainers.recipe.schema import load_recipe
from trainers.text_store.store import TextEmbeddingStore


def test_a_whole_curriculum_from_a_bucket(bucket, tmp_path, caplog):
    write_parts(tmp_path)
    content = settings(tmp_path)
    pairs = content["data"]["train"]
    content["data"]["eval"] = pairs
    content["stages"]["contrastive_tuning"] |= {"num_train_epochs": 1, "eval_strategy": "epoch"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    local = Curriculum(load_recipe(tmp_path / "recipe.yaml"))
    local.run()

    # The same from the bucket, with the stores that were built here, and the held-out rows as a stream.
    for name in ("pairs.parquet", "texts.jsonl"):
        bucket.put(tmp_path / name, f"data/{name}")
    stores = {
        which: bucket.put(tmp_path / "out/text-stores" / which, f"stores/{which}") for which in ("llm", "teacher")
    }
    remote = {**pairs, "source": f"{bucket.url}/data/pairs.parquet"}
    texts = {**content["data"]["texts"], "source": f"{bucket.url}/data/*.jsonl"}
    change = {
        "base": "../recipe.yaml",
        "output_dir": str(tmp_path / "remote"),
        "data": {"train": remote, "texts": texts, "eval": {**remote, "streaming": True}},
        "text_stores": {which: {"path": path} for which, path in stores.items()},
    }
    bucket.put(tmp_path / "recipe.yaml", "recipe.yaml")
    bucket.system.pipe_file(f"{bucket.url}/recipes/remote.yaml", json.dumps(change).encode())
    done = CliRunner().invoke(app, ["train", f"{bucket.url}/recipes/remote.yaml"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert_same_weights(tmp_path / "out", tmp_path / "remote")
    finished = [
        json.loads((folder / "contrastive_tuning/complete.json").read_text())
        for folder in (tmp_path / "out", tmp_path / "remote")
    ]
    losses = [record["last_evaluation"]["eval_loss"] for record in finished]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert len(TextEmbeddingStore(stores["llm"])) == 88
    written = "".join(
        file.read_text() for file in (tmp_path / "remote").rglob("*.*") if file.suffix in (".json", ".yaml", ".md")
    )
    assert f"{bucket.url}/data/pairs.parquet" in written and SECRET not in written + caplog.text + done.output

    # Finished steps stay so until a file changes under its name.
    again = CliRunner().invoke(app, ["train", f"{bucket.url}/recipes/remote.yaml", "--dry-run"])
    assert again.output.count("finished") == 2 and "text store llm: 88 texts" in again.output, again.output
    bucket.system.pipe_file(f"{bucket.url}/data/texts.jsonl", b'{"caption": "another"}\n')
    with pytest.raises(RecipeError, match=r"with other files: data.texts has changed: it was 1 files of"):
        Curriculum(load_recipe(f"{bucket.url}/recipes/remote.yaml")).run()


def test_recipes_of_a_bucket_build_on_each_other_and_on_nothing_here(bucket, tmp_path):
    (tmp_path / "here.yaml").write_text("seed: 1")
    for name, text in {
        "a.yaml": "seed: 1\nprecision: auto",
        "folder/b.yaml": "base: ../a.yaml\nseed: 2",
        "folder/outside.yaml": f"base: {tmp_path}/here.yaml",
        "folder/above.yaml": "base: ../../../a.yaml",
        "bad.yaml": "seed: [",
    }.items():
        bucket.system.pipe_file(f"{bucket.url}/{name}", text.encode())
    assert read_recipe(f"{bucket.url}/folder/b.yaml", ["precision=float32"]) == {"seed": 2, "precision": "float32"}
    (tmp_path / "local.yaml").write_text(f"base: {bucket.url}/a.yaml")
    assert read_recipe(tmp_path / "local.yaml") == {"seed": 1, "precision": "auto"}
    for name, message in {
        "folder/outside.yaml": f"there is no recipe {bucket.url}/folder{tmp_path}/here.yaml, which .* builds on",
        "folder/above.yaml": "there is no recipe s3://a.yaml, which .* builds on",
        "none.yaml": f"there is no recipe {bucket.url}/none.yaml",
        "bad.yaml": f"{bucket.url}/bad.yaml, line 1: ",
        "folder": f"{bucket.url}/folder is a folder or a pattern",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_recipe(f"{bucket.url}/{name}")


def test_a_password_in_an_address_is_refused_before_anything_is_written(tmp_path):
    content = settings(tmp_path)
    path = tmp_path / "recipe.yaml"
    for change in (
        {"data": {**content["data"], "train": {"source": f"s3://me:{SECRET}@bucket/a.tar"}}},
        {"text_stores": {"llm": {"path": f"https://host/store?token={SECRET}"}}},
        {"output_dir": "s3://bucket/out"},
    ):
        path.write_text(json.dumps({**content, **change}))
        done = CliRunner().invoke(app, ["train", str(path)])
        assert done.exit_code == 1 and SECRET not in done.output
        assert "holds a user name, a password" in done.output or "output_dir must be a folder of this" in done.output
    assert list(tmp_path.iterdir()) == [path]
