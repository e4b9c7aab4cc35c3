"""`convert` on thousands of mutated files: each converts or is refused by our own error, and nothing half is left."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_proclip import ConversionError, convert
from tests import golden


def small_params() -> dict[str, torch.Tensor]:
    """The recorded OpenAI layout cut to one layer and a few channels, so that many files fit into a minute."""
    sizes = {32: 8, 96: 24, 128: 16, 24: 4, 192: 8, 16: 6, 17: 5}
    params = {}
    for name, tensor in golden.load("g2_vit_quickgelu").params.items():
        if "resblocks.1" not in name:
            shape = [sizes.get(n, n) for n in tensor.shape]
            params[name] = torch.randn(shape, generator=torch.Generator().manual_seed(len(params)))
    return params


def mutate(content: bytes, rng: random.Random) -> bytes:
    data, kind = bytearray(content), rng.randrange(6)
    place = rng.randrange(len(data))
    if kind == 0:
        del data[place:]
    elif kind == 1:
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 2:
        end = min(len(data), place + rng.randrange(1, 400))
        data[place:end] = bytes(end - place)
    elif kind == 3:
        data[place:place] = rng.randbytes(rng.randrange(1, 50))
    elif kind == 4:
        data[rng.randrange(min(len(data), 3000))] ^= 1 << rng.randrange(8)  # headers and pickles are in front
    else:
        del data[place : place + rng.randrange(1, 60)]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
def test_two_thousand_mutated_files(tmp_path):
    """A mutated file converts, where only a weight's digits changed, or is refused by our own error; nothing else, and nothing half."""
    params, seeds = small_params(), {}
    torch.save(params, tmp_path / "a.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in params.items()}, "epoch": 1}, tmp_path / "b.pt")
    torch.save(params, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    save_file(params, tmp_path / "d.safetensors")
    for file in sorted(tmp_path.iterdir()):
        convert(file, tmp_path / "out", head_width=4)
        shutil.rmtree(tmp_path / "out")
        seeds[file.name] = file.read_bytes()
        file.unlink()
    llm = {file.name: file.read_bytes() for file in (golden.GOLDEN_DIR / "g5_text_pipeline_hf").iterdir()}
    rng, converted = random.Random(0), 0
    for i in range(2000):
        source = tmp_path / "source"
        if i % 5 == 4:  # an LLM's folder, its config or its weights mutated
            source.mkdir()
            chosen = rng.choice(["config.json", "model.safetensors"])
            for name in ("config.json", "model.safetensors"):
                (source / name).write_bytes(mutate(llm[name], rng) if name == chosen else llm[name])
        else:
            name = sorted(seeds)[i % 4]
            source = source.with_suffix(Path(name).suffix)
            source.write_bytes(mutate(seeds[name], rng))
        try:
            convert(source, tmp_path / "out", head_width=4)
        except ConversionError as error:
            assert str(error)
        else:
            converted += 1
            assert load_file(tmp_path / "out" / "model.safetensors")
            shutil.rmtree(tmp_path / "out")
        shutil.rmtree(source) if source.is_dir() else source.unlink()
        assert not list(tmp_path.iterdir()), f"file {i} left something"
    assert 50 < converted < 800, "most mutations are noticed, and some only change a weight"
