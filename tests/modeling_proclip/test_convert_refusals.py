"""What `convert` refuses: files that would run code, damaged files, files that do not fit. One error class, nothing written, nothing run."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_proclip import ConversionError, convert
from modeling_proclip.conversion.output import PlannedTensor, plan_shards, write_tensors
from tests import golden
from tests.modeling_proclip import tiny


PUBLISHED = golden.GOLDEN_DIR / "g2_vit_quickgelu.bare.pt"


@pytest.fixture
def params() -> dict[str, torch.Tensor]:
    return golden.load("g2_vit_quickgelu").params


def refused(source: Path, tmp_path: Path, **options) -> str:
    """The message of the refusal; asserts that it left nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConversionError) as caught:
        convert(source, tmp_path / "out", **{"head_width": 8, **options})
    assert sorted(tmp_path.iterdir()) == before
    return str(caught.value)


# Files that would run code


class CreatesAFile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_would_create_a_file_creates_nothing(zipped, params, tmp_path):
    victim = tmp_path / "created"
    content = {"state_dict": params, "args": CreatesAFile(victim)}
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    message = refused(tmp_path / "evil.pt", tmp_path)
    assert not victim.exists()
    assert "evil.pt is refused, and nothing of it was run" in message and "io.open" in message
    assert "weights_only" not in message, "no advice to load without protection"

    torch.load(tmp_path / "evil.pt", weights_only=False)["args"].close()
    assert victim.exists(), "the file is a weapon: loaded without protection it works"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_that_would_run_a_command_runs_nothing(protocol, tmp_path):
    victim = tmp_path / "created"

    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {victim}",)

    for name in ("evil.pt", "evil.bin", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(pickle.dumps({"visual.proj": Runs()}, protocol))
        assert f"{os.system.__module__}.system" in refused(tmp_path / name, tmp_path)
        assert not victim.exists()


def test_trainer_arguments_are_named(params, tmp_path):
    import argparse

    torch.save({"state_dict": params, "args": argparse.Namespace(lr=1)}, tmp_path / "run.pt")
    assert "argparse.Namespace" in refused(tmp_path / "run.pt", tmp_path)


# Damaged files


def test_empty_truncated_and_foreign_files(tmp_path):
    whole = PUBLISHED.read_bytes()
    for name, content in {
        "empty.pt": b"",
        "cut.pt": whole[: len(whole) // 2],
        "text.pt": b"<html>404</html>",
        "empty.safetensors": b"",
        "cut.safetensors": (golden.GOLDEN_DIR / "g2_eva02.safetensors").read_bytes()[:-10],
    }.items():
        (tmp_path / name).write_bytes(content)
        assert name in refused(tmp_path / name, tmp_path)
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(tmp_path / "pointer.pt", tmp_path)
    assert "neither a file nor a folder" in refused(tmp_path / "absent.pt", tmp_path)
    (tmp_path / "folder").mkdir()
    assert "holds neither model.safetensors" in refused(tmp_path / "folder", tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["visual.conv1.weight", "text.text_adaptor.0.fn.0.weight", "logit_scale"])
def test_not_a_number(name, value, params, tmp_path):
    params[name].view(-1)[-1] = value
    torch.save(params, tmp_path / "nan.pt")
    message = refused(tmp_path / "nan.pt", tmp_path)
    assert "nan.pt" in message and repr(name) in message and "NaN or infinity" in message


def header(**tensors) -> bytes:
    encoded = json.dumps(tensors).encode()
    return struct.pack("<Q", len(encoded)) + encoded


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2**31) + b"{" * 100,
        header(a={"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}) + bytes(16),
        header(a={"dtype": "F32", "shape": [8], "data_offsets": [0, 16]}) + bytes(16),
        header(a={"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}) + bytes(16),
        header(
            a={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            b={"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        )
        + bytes(24),
        header(a={"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}) + bytes(16),
        header(a={"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}) + bytes(16),
    ],
)
def test_lying_safetensors_headers(content, tmp_path):
    (tmp_path / "lies.safetensors").write_bytes(content)
    assert "lies.safetensors" in refused(tmp_path / "lies.safetensors", tmp_path)


def test_a_tensor_larger_than_the_file_allocates_nothing(params, tmp_path):
    params["visual.conv1.weight"] = torch.zeros(1).expand(1 << 20, 3, 1 << 10, 1 << 10)
    buffer = io.BytesIO()
    torch.save(params, buffer)
    (tmp_path / "huge.pt").write_bytes(buffer.getvalue())
    assert "claims more elements than the file holds" in refused(tmp_path / "huge.pt", tmp_path)


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 26))
    assert "records are larger than the file" in refused(tmp_path / "bomb.pt", tmp_path)


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.zeros(32, 16, dtype=torch.long), "torch.int64"),
        (torch.zeros(32, 16).to_sparse(), "sparse"),
        (torch.zeros(32, 16, dtype=torch.complex64), "complex64"),
        ("not a tensor", "is str and no tensor"),
    ],
)
def test_entries_that_are_no_weights(value, message, params, tmp_path):
    torch.save(params | {"visual.proj": value}, tmp_path / "odd.pt")
    text = refused(tmp_path / "odd.pt", tmp_path)
    assert "'visual.proj'" in text and message in text


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, torch.zeros(3), {3: torch.zeros(3)}])
def test_pickles_that_are_no_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "odd.pt")
    assert "odd.pt" in refused(tmp_path / "odd.pt", tmp_path)


def test_index_that_leaves_its_folder(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    for content, message in [
        ({"weight_map": {"a": "../secret.safetensors"}}, "outside"),
        ({"weight_map": {"a": "gone.safetensors"}}, "lacks gone.safetensors"),
        ({"weight_map": []}, "no weight_map"),
        ([], "no JSON object"),
    ]:
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        assert message in refused(folder, tmp_path)


# Files that do not fit


def test_missing_unused_and_wrong_tensors_are_listed_together(params, tmp_path):
    del params["visual.ln_post.bias"], params["text.text_adaptor.0.fn.3.bias"]
    params["visual.extra.weight"] = torch.zeros(3)
    params["visual.ln_pre.weight"] = torch.zeros(31)
    torch.save(params, tmp_path / "odd.pt")
    message = refused(tmp_path / "odd.pt", tmp_path)
    assert "missing from the checkpoint: text.text_adaptor.0.fn.3.bias, visual.ln_post.bias" in message
    assert "unused: visual.extra.weight" in message
    assert "visual.ln_pre.weight (31,) for vision_model.pre_layrnorm.weight, which should be (32,)" in message


@pytest.mark.parametrize("case", ["g2_vit_quickgelu", "g2_eva02", "g2_eva01_layerscale", "g2_siglip2_timm"])
def test_no_tensor_can_be_left_out_or_misshapen(case, tmp_path):
    """Every tensor of every layout, in turn, but those that may be missing: rotary tables and the bias of the adapter's last layer."""
    params = golden.load(case).params
    optional = max(name for name in params if "text_adaptor" in name and name.endswith(".bias"))
    options = {"dry_run": True} | ({"rope_pretrained_grid": 3} if case == "g2_eva02" else {})
    for name in params:
        if "rope" in name or name == optional:
            continue
        torch.save({key: tensor for key, tensor in params.items() if key != name}, tmp_path / "odd.pt")
        assert "odd.pt" in refused(tmp_path / "odd.pt", tmp_path, **options)
        torch.save(params | {name: torch.zeros(*params[name].shape, 2)}, tmp_path / "odd.pt")
        assert "odd.pt" in refused(tmp_path / "odd.pt", tmp_path, **options)


def test_a_named_pipe_is_no_file(tmp_path):
    """Whoever opens one to read waits until somebody writes."""
    os.mkfifo(tmp_path / "pipe.pt")
    assert "pipe.pt is no file" in refused(tmp_path / "pipe.pt", tmp_path)
    lora = tmp_path / "lora"
    lora.mkdir()
    os.mkfifo(lora / "adapter_config.json")
    message = refused(tiny.LLAMA_DIR, tmp_path, head_width=64, lora_adapters=[lora])
    assert "adapter_config.json cannot be read as JSON: ValueError: it is no file" in message


def test_a_vision_tower_alone(params, tmp_path):
    torch.save({name: tensor for name, tensor in params.items() if name.startswith("visual")}, tmp_path / "tower.pt")
    assert "no text adapter" in refused(tmp_path / "tower.pt", tmp_path)


def test_layers_that_skip_a_number_or_claim_a_billion(params, tmp_path):
    layer = "visual.transformer.resblocks."
    renamed = {name.replace(f"{layer}1.", f"{layer}999999999."): tensor for name, tensor in params.items()}
    torch.save(renamed, tmp_path / "odd.pt")
    assert f"has no {layer}1" in refused(tmp_path / "odd.pt", tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head_width": 5}, "head_width"),
        ({"image_size": 4}, "smaller than a patch"),
        ({"patch_size": 4}, "EVA's layout only"),
        ({"adapter_input_norm": "standardize"}, "adapter_input_norm"),
        ({"dtype": "int8"}, "dtype=torch.int8 is not one of"),
        ({"dtype": "half-ish"}, "dtype='half-ish' is not one of"),
        ({"lora_adapters": [golden.GOLDEN_DIR]}, "no LLM"),
        ({"prompt_template": "{text}"}, "text_model"),
        ({"text_model": golden.GOLDEN_DIR / "g5_text_pipeline_hf"}, "embeddings of 32, and the text adapter takes 24"),
        ({"text_model": golden.GOLDEN_DIR / "absent"}, "cannot be read"),
        ({"vision_processor": golden.GOLDEN_DIR / "absent"}, "cannot be loaded"),
    ],
)
def test_options_that_do_not_fit(options, message, tmp_path):
    assert message in refused(PUBLISHED, tmp_path, **options)


def test_output_that_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    assert "is there already" in refused(PUBLISHED, tmp_path)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_output_appears_only_when_complete(params, tmp_path):
    """The last tensor in the file's order is the damaged one, so that all others are written before."""
    params["visual.proj"][0, 0] = float("nan")
    torch.save(params, tmp_path / "late.pt")
    refused(tmp_path / "late.pt", tmp_path)
    convert(PUBLISHED, tmp_path / "deep" / "er" / "out", head_width=8)
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "er" / "out").stat().st_mode & 0o777 == tmp_path.joinpath(
        "deep"
    ).stat().st_mode & 0o777


# Writing


def test_shards_and_their_index(tmp_path):
    tensors = {
        f"t{i}": torch.randn(10, i + 1).to(dtype)
        for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
    }
    planned = [PlannedTensor(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]
    assert [[t.name for t in shard] for shard in plan_shards(planned, 80).values()] == [["t0", "t1"], ["t2"]]
    assert list(plan_shards(planned, 10)) == [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    write_tensors(tmp_path, planned)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


MEASURE = """
import re, sys
from pathlib import Path
from modeling_proclip import convert

def peak():  # not getrusage, which a process inherits from the one that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

source, small, output = sys.argv[1:]
convert(small, output + "-small", head_width=8)  # what the libraries load on first use is the interpreter's
before = peak()
convert(source, output, head_width=64)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_at_most_the_file_and_one_tensor(tmp_path):
    """In a process of its own, whose largest residency counts the mapped file too; 10 MB are for page tables, headers and the config."""
    width, llm = 256, 2048
    params = {}
    for name, tensor in golden.load("g2_vit_quickgelu").params.items():
        shape = [{32: width, 96: 3 * width, 128: 4 * width, 24: llm, 192: 8 * llm}.get(n, n) for n in tensor.shape]
        params[name] = torch.randn(shape)
    torch.save(params, tmp_path / "large.pt")
    largest = max(tensor.numel() * 4 for tensor in params.values())
    size = (tmp_path / "large.pt").stat().st_size
    assert size > 250e6 and largest > 120e6
    command = (sys.executable, "-c", MEASURE, tmp_path / "large.pt", PUBLISHED, tmp_path / "out")
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert 0.9 * size < int(done.stdout) < size + largest + 10e6, "the file was read, and nothing beside it was kept"
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 250e6
