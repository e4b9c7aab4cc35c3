"""Where `convert` writes: folders of every kind, nothing half-written, nothing left behind, no code, and finite weights only."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modeling_proclip import ConversionError, convert
from modeling_proclip.conversion import converter
from modeling_proclip.conversion.code_references import code_names, without_code
from modeling_proclip.conversion.output import scratch_folder, write_tensors
from tests import golden
from tests.modeling_proclip import tiny
from tests.modeling_proclip.test_convert_llm import published_for_the_llm


SOURCE = golden.GOLDEN_DIR / "g2_vit_quickgelu.bare.pt"
WRITTEN = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_empty_folder_behind_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(SOURCE, tmp_path / "link", head_width=8)
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == WRITTEN and len(names(tmp_path)) == 2


def test_a_link_to_a_folder_that_is_not_there_yet(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(SOURCE, tmp_path / "link", head_width=8)
    assert names(tmp_path / "real") == WRITTEN


def test_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert(SOURCE, ".", head_width=8)
    assert names(tmp_path) == WRITTEN and AutoModel.from_pretrained(".", load_text_model=False)


def test_a_mount_point_as_a_new_disk_is(tmp_path):
    (tmp_path / "volume").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path / "volume"], capture_output=True).returncode:
        pytest.skip("only root mounts")
    try:
        (tmp_path / "volume/lost+found").mkdir()
        convert(SOURCE, tmp_path / "volume", head_width=8)
        assert names(tmp_path / "volume") == sorted([*WRITTEN, "lost+found"])
    finally:
        subprocess.run(["umount", tmp_path / "volume"], check=True)


@pytest.mark.parametrize("there", [True, False])
def test_a_failure_leaves_nothing(tmp_path, monkeypatch, there):
    if there:
        (tmp_path / "out").mkdir()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(converter, "remove_code", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(SOURCE, tmp_path / "out", head_width=8)
    assert names(tmp_path) == (["out"] if there else []) and not there or names(tmp_path / "out") == []


@pytest.mark.parametrize("there", [True, False])
def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path, there):
    if there:
        (tmp_path / "out").mkdir()
    for name in (".out.partial-notes", ".out.partial", "out.partial-x"):  # somebody else's
        (tmp_path / name).mkdir()
    others = names(tmp_path)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            converter.write_tensors = lambda *arguments: (
                write_tensors(*arguments),
                os.kill(os.getpid(), signal.SIGKILL),
            )
            convert(SOURCE, tmp_path / "out", head_width=8)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "out/config.json").exists()  # nothing half-written is taken for a checkpoint
    convert(SOURCE, tmp_path / "out", head_width=8)
    assert set(names(tmp_path)) == {*others, "out"} and names(tmp_path / "out") == WRITTEN


def test_a_run_that_goes_on_is_let_alone(tmp_path):
    with scratch_folder(tmp_path, ".out.partial-") as theirs:
        (theirs / "weights").write_text("x")
        convert(SOURCE, tmp_path / "out", head_width=8)
        with scratch_folder(tmp_path, ".out.partial-") as ours:
            assert ours != theirs
        assert (theirs / "weights").exists()
    assert names(tmp_path) == ["out"]


def test_two_runs_into_one_empty_folder(tmp_path):
    with scratch_folder(tmp_path, f".{tmp_path.name}.partial-"):
        with pytest.raises(ConversionError, match="is not an empty folder"):
            convert(SOURCE, tmp_path, head_width=8)


def test_an_output_that_somebody_else_fills_meanwhile(tmp_path, monkeypatch):
    def fill(folder):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/theirs").write_text("x")

    monkeypatch.setattr(converter, "remove_code", fill)
    with pytest.raises(ConversionError, match="was written by somebody else meanwhile"):
        convert(SOURCE, tmp_path / "out", head_width=8)
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["theirs"]


# Weights that are not finite


def lora(folder: Path, alpha: object) -> Path:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModel.from_pretrained(tiny.LLAMA_DIR), config).save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": alpha}))
    return folder


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -float("inf"), 1e300, 10**400, "16", True, None])
def test_an_alpha_that_is_no_number_is_refused(tmp_path, alpha):
    with pytest.raises(
        ConversionError, match="adapter_config.json: lora_alpha is .*, and should be a number such as 16"
    ):
        convert(tiny.LLAMA_DIR, tmp_path / "out", lora_adapters=[lora(tmp_path / "lora", alpha)])
    assert not (tmp_path / "out").exists()


def test_weights_that_become_infinite_are_refused_by_name(tmp_path):
    adapter = lora(tmp_path / "lora", 9e5)
    with pytest.raises(ConversionError, match="layers.0.self_attn.q_proj.weight.* overflows in float16"):
        convert(tiny.LLAMA_DIR, tmp_path / "out", lora_adapters=[adapter], dtype="float16")
    assert names(tmp_path) == ["lora"]


# Code of others

EVIL = "evil/repo--evil.Evil"


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def holds_evil(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and b"evil" in path.read_bytes()]


@pytest.fixture
def evil_llm(tmp_path) -> Path:
    folder = Path(shutil.copytree(tiny.LLAMA_DIR, tmp_path / "llm", copy_function=shutil.copyfile))
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, EVIL]})
    edit(folder / "config.json", auto_map={"AutoModel": EVIL}, custom_pipelines={"x": {"impl": EVIL}})
    return folder


def test_an_llm_s_result_names_no_code(evil_llm, tmp_path):
    convert(evil_llm, tmp_path / "out")
    assert not holds_evil(tmp_path / "out")


def test_the_result_of_a_tower_names_no_code_of_its_llm_or_image_processor(evil_llm, tmp_path, monkeypatch):
    def asked(*arguments):
        raise AssertionError("nobody is asked, and nothing is trusted")

    monkeypatch.setattr("builtins.input", asked)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "vision")
    edit(tmp_path / "vision/preprocessor_config.json", auto_map={"AutoImageProcessor": EVIL})
    settings = {"text_model": evil_llm, "vision_processor": tmp_path / "vision", "head_width": 8}
    convert(published_for_the_llm(tmp_path), tmp_path / "out", **settings)
    assert not holds_evil(tmp_path / "out")


def test_keys_that_name_code():
    settings = {"a": [{"auto_map": {"X": [None, EVIL]}}], "attn_implementation": {"text_config": "evil/kernel"}}
    settings |= {"b": {"trust_remote_code": True, "attn_implementation": "sdpa"}, "layers": ["x"]}
    assert code_names(settings) == [EVIL, "evil/kernel"]
    assert without_code(settings) == {"a": [{}], "b": {"attn_implementation": "sdpa"}, "layers": ["x"]}


# Options that would be ignored


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_pretrained_grid": 8}, "rope_pretrained_grid is for the rotary positions of EVA02"),
        ({"text_model_revision": "v2"}, "text_model_revision is that of text_model, which is not given"),
        ({"text_model": tiny.LLAMA_DIR, "text_model_revision": "v2"}, "is a folder: leave it out"),
        ({"revision": "v2"}, "revision is for a source on the Hub"),
        ({"patch_size": 4}, "patch_size resamples the patches of EVA"),
        ({"lora_adapters": ["x"]}, "lora_adapters can only be merged into one"),
        ({"prompt_template": "{text}"}, "prompt_template is for the tokenizer of an LLM"),
    ],
)
def test_options_that_would_be_ignored_are_refused(tmp_path, options, message):
    source = published_for_the_llm(tmp_path) if "text_model" in options else SOURCE
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "out", head_width=8, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 32},
        {"head_width": 8},
        {"quick_gelu": False},
        {"text_model": "a/b"},
        {"prompt_template": "{text}"},
    ],
)
def test_options_of_towers_are_refused_with_an_llm(tmp_path, options):
    with pytest.raises(
        ConversionError, match=f"is an LLM itself: {next(iter(options))} is for the checkpoint of a vision tower"
    ):
        convert(tiny.LLAMA_DIR, tmp_path / "out", **options)
