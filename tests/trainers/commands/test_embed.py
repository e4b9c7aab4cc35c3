import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import datasets
import pytest
import torch
from transformers import CLIPVisionModel
from typer.testing import CliRunner

from tests.trainers.fake_encoder import contents
from tests.trainers.tiny_encoders import make_texts, tiny_clip, tiny_proclip
from tests.trainers.tiny_pairs import write_layout
from trainers.cli import app
from trainers.data import TextEmbeddingStore, iter_texts
from trainers.data.text_files import read_texts


TEXTS = ["a red fox", "two boats, under a house", '"quoted", Übung', "狐狸 🦊", "a red fox"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in tiny_proclip(max_length=20):
        part.save_pretrained(folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["embed", *map(str, arguments)])


def refused(*arguments) -> str:
    result = run(*arguments)
    assert result.exit_code == 1 and "Traceback" not in result.output
    return result.output.strip().splitlines()[-1]


def write(folder, name):
    """`TEXTS` in a file or folder of every kind that can be read, and the arguments that read it."""
    path = folder / name
    rows = [{"id": i, "caption": text} for i, text in enumerate(TEXTS)]
    if name == "a.txt":
        path.write_text("\ufeff" + "\r\n".join(TEXTS[:3]) + "\n\n" + "\n".join(TEXTS[3:]), encoding="utf-8")
        return [path]
    if name == "plain.json":
        path.write_text(json.dumps(TEXTS))
        return [path]
    if name == "a.json":
        path.write_text(json.dumps(rows))
    elif name == "a.jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif name == "a.csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["id", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    elif name == "a.parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif name == "lists.jsonl":
        path.write_text(json.dumps({"caption": TEXTS[:2]}) + "\n" + json.dumps({"caption": TEXTS[2:]}) + "\n")
    elif name == "arrow":
        datasets.DatasetDict(valid=datasets.Dataset.from_list(rows)).save_to_disk(path)
        return [path, "--column", "caption", "--split", "valid"]
    elif name == "folder":
        path.mkdir()
        datasets.Dataset.from_list(rows).to_parquet(path / "train.parquet")
    return [path, "--column", "caption"]


KINDS = ["a.txt", "plain.json", "a.json", "a.jsonl", "a.csv", "a.parquet", "lists.jsonl", "arrow", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_its_texts(tmp_path, kind):
    path, *options = write(tmp_path, kind)
    options = dict(zip([option.removeprefix("--") for option in options[::2]], options[1::2], strict=True))
    source = read_texts(path, **options)
    assert list(source) == TEXTS
    assert list(source) == TEXTS, "reading again starts anew"


@pytest.mark.parametrize("layout", ["webdataset", "imagefolder", "beside"])
def test_captions_of_pictures_are_texts(tmp_path, layout):
    source = write_layout(tmp_path / layout, layout)
    column = None if source.text_columns == "text" else source.text_columns
    assert list(read_texts(source.source, column)) == list(iter_texts(source))


def test_embeds_a_column_and_says_what_it_did(tmp_path, checkpoint):
    arguments = [*write(tmp_path, "a.csv"), "--model", checkpoint, "--output", tmp_path / "store", "--device", "cpu"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "5 texts: 4 embedded, 0 in the store before, 1 repeated, 1 cut to 20 tokens" in result.output
    assert f"{tmp_path / 'store'}: 4 embeddings of 32 float32" in result.output and "texts/s" in result.output
    model, processor = tiny_proclip(max_length=20)
    with torch.no_grad():
        expected = model.get_llm_embeds(**processor(text=TEXTS, return_tensors="pt"))
    torch.testing.assert_close(TextEmbeddingStore(tmp_path / "store").lookup(TEXTS), expected, atol=1e-5, rtol=1e-5)
    result = run(*arguments)
    assert "5 texts: 0 embedded, 5 in the store before, 0 repeated" in result.output


def test_options_reach_the_store(tmp_path):
    for part in tiny_clip():
        part.save_pretrained(tmp_path / "clip")
    (tmp_path / "a.txt").write_text("\n".join(make_texts(10)))
    options = ["--dtype", "bfloat16", "--shard-size", 4, "--token-budget", 50, "--device", "cpu"]
    result = run(tmp_path / "a.txt", "--model", tmp_path / "clip", "--output", tmp_path / "store", *options)
    assert result.exit_code == 0, result.output
    store = TextEmbeddingStore(tmp_path / "store")
    assert (len(store), store.dim, store.dtype) == (10, 16, torch.bfloat16)
    assert len(list((tmp_path / "store").glob("shard-*"))) == 3


def test_dtype_and_attention_of_the_model(tmp_path, checkpoint):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    arguments = [tmp_path / "a.txt", "--model", checkpoint, "--device", "cpu", "--output"]
    options = ["--model-dtype", "bfloat16", "--attn-implementation", "eager"]
    result = run(*arguments, tmp_path / "half", *options)
    assert result.exit_code == 0, result.output
    assert "embeddings of 32 float32" in result.output and "the model ran in bfloat16" in result.output
    assert "the model ran in float32" in run(*arguments, tmp_path / "whole").output
    half, whole = (TextEmbeddingStore(tmp_path / name).lookup(TEXTS) for name in ("half", "whole"))
    assert torch.equal(half, half.bfloat16().float()) and not torch.equal(whole, whole.bfloat16().float())
    assert torch.nn.functional.cosine_similarity(half, whole).min() > 0.999
    assert "weights_sha256" in refused(*arguments, tmp_path / "half"), "another dtype, another store"
    message = refused(*arguments, tmp_path / "flash", "--attn-implementation", "flash_attention_2")
    assert message.startswith("error: flash_attention_2 cannot be used: ") and "pip install" in message


def test_wrong_sources_are_refused_in_one_line(tmp_path, checkpoint):
    def message(name: str, content: str | bytes | None, *options):
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return refused(
            tmp_path / name, "--model", checkpoint, "--output", tmp_path / "store", "--device", "cpu", *options
        )

    column = ("--column", "caption")
    assert message("none.txt", None) == f"error: there is no file {tmp_path / 'none.txt'}"
    assert message("a.txt", "") == f"error: {tmp_path / 'a.txt'} holds no texts"
    assert message("a.txt", "fox\n", *column).endswith("a.txt has no columns: leave --column out")
    assert "a.docx is of an unknown kind" in message("a.docx", "x")
    rows = '{"id": 1, "text": "fox"}\n{"id": 2, "text": null}\n'
    assert "a.txt is not encoded as UTF-8: line 2, byte 1 is 0xFF" in message("a.txt", b"fox\n\xff\xfe\n")
    missing = "has no column 'caption' for the captions (text_columns, or --column); its columns are id, text"
    assert f"a.jsonl {missing}" in message("a.jsonl", rows, *column)
    assert "a.jsonl: name the column of the texts with --column; the columns are id, name" in message(
        "a.jsonl", rows.replace("text", "name")
    )
    assert "1 rows without a caption among 2 rows" in message("a.jsonl", rows)
    assert "The first: a.jsonl, line 2: it has no caption" in message("a.jsonl", rows, "--column", "text")
    assert "a.jsonl, line 2: column 'id' holds the int 2, where a text was expected" in message(
        "a.jsonl", '{"id": "1"}\n{"id": 2}\n', "--column", "id"
    )
    assert "a.jsonl, line 2 is no JSON" in message("a.jsonl", '"fox"\n{"id": \n')
    assert "a.jsonl has no column 'caption'" in message("a.jsonl", '"fox"', *column)
    assert "a.json holds a dict where a list" in message("a.json", '{"text": ["fox"]}')
    assert "a.json is no JSON" in message("a.json", "[")
    assert f"a.csv {missing}" in message("a.csv", "id,text\n1,fox\n", *column)
    assert "a.csv, line 3: 1 fields where the header names 2 (id, text)" in message("a.csv", "id,text\n1,fox\n2\n")
    assert "a.parquet is no Parquet file" in message("a.parquet", "id,text", *column)
    datasets.Dataset.from_dict({"id": [1], "text": ["fox"]}).to_parquet(tmp_path / "a.parquet")
    assert f"a.parquet {missing}" in message("a.parquet", None, *column)
    write(tmp_path, "arrow")
    assert "arrow has no split 'train'; it has valid" in message("arrow", None, *column)
    assert "arrow has no column 'title' for the captions (text_columns, or --column); its columns are id, caption" in (
        message("arrow", None, "--split", "valid", "--column", "title")
    )
    assert not (tmp_path / "store" / "store.json").exists()


def test_wrong_models_are_refused_in_one_line(tmp_path, checkpoint):
    (tmp_path / "a.txt").write_text("fox")

    def message(model):
        return refused(tmp_path / "a.txt", "--model", model, "--output", tmp_path / "store", "--device", "cpu")

    CLIPVisionModel(tiny_clip()[0].config.vision_config).save_pretrained(tmp_path / "vision")
    assert message(tmp_path / "vision").startswith("error: CLIPVisionModel has no text side")
    assert message(tmp_path / "nowhere").startswith("error: ")
    assert not (tmp_path / "store").exists()
    assert run(tmp_path / "a.txt", "--model", checkpoint, "--output", tmp_path / "store").exit_code == 0
    other = tmp_path / "other"
    for part in tiny_proclip(max_length=20, text_pooling="last_token"):
        part.save_pretrained(other)
    assert "pooling is 'mean' there and" in message(other)


def test_a_killed_command_resumes_to_the_same_bytes(tmp_path, checkpoint):
    (tmp_path / "a.txt").write_text("\n".join(make_texts(300)))

    def arguments(store):
        return [tmp_path / "a.txt", "--model", checkpoint, "--output", tmp_path / store, "--shard-size", 15]

    killed = subprocess.Popen(
        [sys.executable, "-m", "trainers.cli", "embed", *map(str, arguments("killed")), "--token-budget", "1"],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # another number adds in another order
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "killed" / "shard-00001.safetensors").exists():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    left = len(list((tmp_path / "killed").glob("shard-*.safetensors")))
    assert 2 <= left < 20

    resumed = run(*arguments("killed"), "--token-budget", 1)
    assert f"{300 - 15 * left} embedded, {15 * left} in the store before" in resumed.output
    assert run(*arguments("whole"), "--token-budget", 1).exit_code == 0
    bytes_of = {name: contents(tmp_path / name) for name in ("whole", "killed")}
    assert len(bytes_of["whole"]) == 22 and bytes_of["whole"] == bytes_of["killed"]


def test_verifies_a_store_and_says_what_to_do(tmp_path, checkpoint):
    source, store = tmp_path / "a.txt", tmp_path / "store"
    source.write_text("\n".join(make_texts(40)))
    arguments = [source, "--model", checkpoint, "--output", store, "--device", "cpu", "--shard-size", 10]
    assert run(*arguments).exit_code == 0
    whole = contents(store)
    assert f"{store}: 40 texts in 4 sound shards\n" in run("--verify", store).output
    again = run(source, "--model", checkpoint, "--verify", store, "--device", "cpu")
    assert again.exit_code == 0 and "40 embedded again (smallest cosine 1.00000)" in again.output, again.output

    shard = store / "shard-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    found = run("--verify", store)
    assert found.exit_code == 1 and "30 texts in 3 sound shards" in found.output
    assert (
        f"error: {shard} is damaged: its embeds have changed since they were written. Delete this file and build"
        in (" ".join(found.output.split()))
    )
    shard.unlink()
    assert "40 texts: 10 embedded, 30 in the store before" in run(*arguments).output
    assert contents(store) == whole
    assert run("--verify", store).exit_code == 0


def test_options_that_do_not_go_together_are_refused(tmp_path):
    whole = ["a.txt", "--model", "m", "--output", "o"]
    for arguments, message in (
        (["a.txt"], "--model, --output is missing"),
        (["--model", "m", "--output", "o"], "TEXTS is missing"),
        (["a.txt", "--verify", tmp_path], "needs both TEXTS and --model"),
        (["--verify", tmp_path, "--output", "o"], "leave --output out"),
        ([*whole, "--process-index", 1], "--process-index and --num-processes go together"),
        ([*whole, "--process-index", 0, "--num-processes", 2, "--num-tasks", 9], "leave --process-index and"),
        ([*whole, "--num-workers", 2], "--num-workers is of --engine ray"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split()), result.output
    assert refused("--verify", tmp_path).endswith("is not a text store: it has no store.json")


def test_launched_processes_fill_one_store(tmp_path, checkpoint):
    """`accelerate launch` and `torchrun` tell each process which one it is by environment variables."""
    (tmp_path / "a.txt").write_text("\n".join(make_texts(40)))
    arguments = [tmp_path / "a.txt", "--model", checkpoint, "--output", tmp_path / "store", "--shard-size", 8]
    for rank in (0, 1):
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        result = CliRunner().invoke(app, ["embed", *map(str, arguments)], env=environment)
        assert result.exit_code == 0, result.output
        assert f"process {rank} of 2: " in result.output and " 0 in the store before, 0 repeated" in result.output
    assert run(*arguments, "--process-index", 1, "--num-processes", 3).exit_code == 0
    store = TextEmbeddingStore(tmp_path / "store")
    assert len(store) == 40 and store.lookup(make_texts(40)).shape == (40, 32)


def test_processes_take_tasks_and_those_of_slurm_share_texts(tmp_path, checkpoint):
    (tmp_path / "a.txt").write_text("\n".join(make_texts(40)))
    arguments = [tmp_path / "a.txt", "--model", checkpoint, "--shard-size", 8, "--output"]
    for number, environment in enumerate(
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, {"RANK": "0", "WORLD_SIZE": "2"})
    ):
        command = ["embed", *map(str, arguments), str(tmp_path / "tasks"), "--num-tasks", "5"]
        result = CliRunner().invoke(app, command, env=environment)
        assert result.exit_code == 0, result.output
        assert ("5 tasks, 40 texts: 40 embedded" if number == 0 else " 0 texts: 0 embedded") in result.output
    for rank in ("0", "1"):
        environment = {"SLURM_PROCID": rank, "SLURM_NTASKS": "2", "SLURM_LOCALID": rank}
        result = CliRunner().invoke(app, ["embed", *map(str, arguments), str(tmp_path / "shares")], env=environment)
        assert f"process {rank} of 2: " in result.output, result.output
    tasks, shares = (TextEmbeddingStore(tmp_path / name).lookup(make_texts(40)) for name in ("tasks", "shares"))
    torch.testing.assert_close(tasks, shares, atol=1e-5, rtol=1e-5)


def test_workers_of_ray_are_told_all_there_is_to_know(tmp_path, checkpoint, monkeypatch):
    """What they get can be pickled and does not depend on the directory; here, this process does their work."""
    from trainers.text_store import ray_workers

    def build(texts, load, path, *, num_tasks, num_workers, **options):
        assert (num_tasks, num_workers) == (100, 3)
        monkeypatch.chdir("/")
        texts, load = pickle.loads(pickle.dumps((texts, load)))
        return TextEmbeddingStore.build(
            texts, *load(), tmp_path / path, num_tasks=num_tasks, progress=False, **options
        )

    monkeypatch.setattr(ray_workers, "build_with_ray", build)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    os.symlink(checkpoint, tmp_path / "model")
    result = run("*.jsonl", "--model", "model", "--output", "store", "--engine", "ray", "--num-workers", 3)
    assert result.exit_code == 0, result.output
    assert "all workers: 100 tasks, 5 texts: 4 embedded, 1 in the store before, 0 repeated" in result.output


def test_ray_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "trainers.text_store.ray_workers", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "a.txt").write_text("a red fox")
    message = refused(tmp_path / "a.txt", "--model", "m", "--output", tmp_path / "store", "--engine", "ray")
    assert message.endswith('install it by: pip install "proclip-transformers[ray]"')
