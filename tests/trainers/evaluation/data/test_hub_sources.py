"""Benchmarks whose data is fetched from the Hub, here a stand-in on loopback that the real clients speak to."""

import json
import os
import subprocess
import sys

import datasets
from huggingface_hub import HfApi

from tests.hub_server import TOKEN, hub_server
from tests.trainers.evaluation.stand_ins import write_tar
from tests.trainers.evaluation.tiny_benchmarks import pictures, save, tiny_encoder
from tests.trainers.tiny_encoders import make_texts
from trainers.evaluation.data.manifest import parse_manifest
from trainers.evaluation.results import read_results


def test_data_and_class_names_come_from_the_hub_and_the_commit_is_recorded(tmp_path, monkeypatch):
    names, texts = ["red fox", "blue boat", "house"], make_texts(12)
    images = pictures(6)
    features = datasets.Features(image=datasets.Image(), captions=datasets.List(datasets.Value("string")))
    (tmp_path / "table" / "data").mkdir(parents=True)
    table = datasets.Dataset.from_dict(
        {"image": images, "captions": [texts[2 * i : 2 * i + 2] for i in range(6)]}, features=features
    )
    table.to_parquet(tmp_path / "table" / "data" / "test-00000-of-00001.parquet")
    zero_shot = {
        "name": "shards",
        "title": "WebDataset with names beside it",
        "kind": "zero_shot",
        "group": "own",
        "data": {"source": "alice/wds_things", "num_items": 6, "files": "test/*.tar"},
        "columns": {"image": "png", "label": "cls"},
        "classes": {"count": 3, "names": "source:classnames.txt"},
        "prompts": ["a {}"],
    }
    (manifest,) = parse_manifest(zero_shot, "test")
    rows = []
    for i, image in enumerate(images):
        image.save(tmp_path / "one.png")
        rows.append({"image": (tmp_path / "one.png").read_bytes(), "label": i % 3})
    write_tar(manifest, rows, tmp_path / "shards")
    (tmp_path / "shards" / "classnames.txt").write_text("\n".join(names) + "\n")
    retrieval = {"name": "table", "title": "Table", "kind": "retrieval", "group": "own"}
    retrieval |= {
        "data": {"source": "alice/table", "num_items": 6},
        "columns": {"image": "image", "captions": "captions"},
    }
    (tmp_path / "suite.yaml").write_text(json.dumps({"name": "hub", "tasks": [zero_shot, retrieval]}))
    model = save(tiny_encoder(), tmp_path / "model")

    with hub_server(tmp_path / "server") as hub:
        hub.patch(monkeypatch, tmp_path / "home")
        api = HfApi(endpoint=hub.url, token=TOKEN)
        for name, folder in (("alice/wds_things", "shards"), ("alice/table", "table")):
            api.create_repo(name, repo_type="dataset")
            api.upload_folder(repo_id=name, folder_path=tmp_path / folder, repo_type="dataset")
        commits = {name: api.dataset_info(name).sha for name in ("alice/wds_things", "alice/table")}
        environment = {
            **os.environ,
            **hub.environment(tmp_path / "home"),
            "HF_DATASETS_CACHE": str(tmp_path / "home" / "datasets"),
        }

        arguments = ["evaluate", str(model), "--suite", str(tmp_path / "suite.yaml"), "--device", "cpu"]
        done = subprocess.run(
            [sys.executable, "-m", "trainers.cli", *arguments, "--output-dir", str(tmp_path / "out")],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        shards, found = read_results(tmp_path / "out")["tasks"]
        assert (shards["dataset"]["revision"], found["dataset"]["revision"]) == tuple(commits.values())
        assert shards["dataset"]["read_from"] == "source" and shards["protocol"]["classes"] == names
        assert found["protocol"]["num_captions"] == 12
