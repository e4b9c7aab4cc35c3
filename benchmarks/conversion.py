"""Time and peak memory of `convert` on checkpoints with the true shapes of the published ones.

    python benchmarks/conversion.py --json conversion.json [--only B/32]

The files hold random fp16 weights under the published key names, in PyTorch's format: vision tower, adapter of 4 blocks with expansion 2 for
an LLM of 4096 dimensions, logit scale. Each conversion runs in a process of its own, `--repeat` times; the shortest time and the largest
memory count. Memory is the growth of the largest residency over that after the imports and a first conversion of a small file; it counts the
pages of the mapped file, and is read from /proc (Linux). The peer is the least that a conversion in memory does: `torch.load`, then `safetensors.torch.save_file` of the
same tensors. Files are in the page cache for both. Needs 4 GB of disk in the temporary directory and a few minutes.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from modeling_proclip.modeling_eva_clip import rotary_tables


LLM_SIZE = 4096
OPENAI = {"kind": "openai", "head_width": 64}
CHECKPOINTS = {
    "B/32": OPENAI | {"width": 768, "layers": 12, "patch": 32, "image": 224, "projection": 512},
    "B/16": OPENAI | {"width": 768, "layers": 12, "patch": 16, "image": 224, "projection": 512},
    "L/14": OPENAI | {"width": 1024, "layers": 24, "patch": 14, "image": 224, "projection": 768},
    "L/14-336": OPENAI | {"width": 1024, "layers": 24, "patch": 14, "image": 336, "projection": 768},
    "EVA02-L/14-336": {
        "kind": "eva",
        "head_width": 64,
        "width": 1024,
        "layers": 24,
        "patch": 14,
        "image": 336,
        "projection": 768,
    },
    "SigLIP2-So400m/14": {
        "kind": "siglip",
        "head_width": 72,
        "width": 1152,
        "layers": 27,
        "patch": 14,
        "image": 224,
        "projection": 1152,
    },
}

OURS = """
import re, sys, time
from pathlib import Path
from modeling_proclip import convert

def peak():  # not getrusage, which a process inherits from the one that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

source, small, output, head_width = sys.argv[1:]
convert(small, output + "-small", head_width=8)
before = peak()
start = time.perf_counter()
convert(source, output, head_width=int(head_width))
print(time.perf_counter() - start, peak() - before)
"""
PEER = """
import re, sys, time
from pathlib import Path
import torch
from safetensors.torch import save_file

def peak():  # not getrusage, which a process inherits from the one that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

source, small, output, _ = sys.argv[1:]
save_file(torch.load(small, weights_only=True), output + "-small")
before = peak()
start = time.perf_counter()
save_file(torch.load(source, weights_only=True), output)
print(time.perf_counter() - start, peak() - before)
"""


def published_shapes(
    kind: str,
    width: int,
    layers: int,
    patch: int,
    image: int,
    projection: int,
    llm: int,
    head_width: int,
    blocks: int = 4,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint of ProCLIP or LLM2CLIP."""
    grid = image // patch
    make = {"openai": _openai, "eva": _eva, "siglip": _siglip}[kind]
    shapes = make(width, layers, patch, grid, projection, head_width)
    adapter = "text.text_proj.text_adaptor." if kind == "siglip" else "text.text_adaptor."
    for i in range(blocks):
        shapes |= _linear(f"{adapter}{i}.fn.0", 2 * llm, llm) | _linear(f"{adapter}{i}.fn.3", llm, 2 * llm)
        shapes |= _norm(f"{adapter}{i}.ln", llm)
    shapes |= _norm(f"{adapter}{blocks}", llm) | _linear(f"{adapter}{blocks + 1}", projection, llm)
    return shapes | {"logit_scale": ()}


def _linear(name: str, out_size: int, in_size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out_size, in_size), f"{name}.bias": (out_size,)}


def _norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _openai(width, layers, patch, grid, projection, head_width):
    shapes = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (1 + grid * grid, width),
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.proj": (width, projection),
        **_norm("visual.ln_pre", width),
        **_norm("visual.ln_post", width),
    }
    for i in range(layers):
        block = f"visual.transformer.resblocks.{i}."
        shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
        shapes |= (
            _linear(f"{block}attn.out_proj", width, width)
            | _norm(f"{block}ln_1", width)
            | _norm(f"{block}ln_2", width)
        )
        shapes |= _linear(f"{block}mlp.c_fc", 4 * width, width) | _linear(f"{block}mlp.c_proj", width, 4 * width)
    return shapes


def _eva(width, layers, patch, grid, projection, head_width):
    hidden = int(width * 2.6667)
    tables = {f"rope.freqs_{kind}": (grid * grid, head_width) for kind in ("cos", "sin")}
    shapes = {
        "visual.cls_token": (1, 1, width),
        "visual.pos_embed": (1, 1 + grid * grid, width),
        "visual.patch_embed.proj.weight": (width, 3, patch, patch),
        "visual.patch_embed.proj.bias": (width,),
        **{f"visual.{name}": shape for name, shape in tables.items()},
        **_norm("visual.norm", width),
        **_linear("visual.head", projection, width),
    }
    for i in range(layers):
        block = f"visual.blocks.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "proj"):
            shapes |= _linear(f"{block}attn.{name}", width, width)
        del shapes[f"{block}attn.k_proj.bias"]
        shapes |= {f"{block}attn.{name}": shape for name, shape in tables.items()}
        shapes |= (
            _norm(f"{block}norm1", width) | _norm(f"{block}norm2", width) | _norm(f"{block}attn.inner_attn_ln", width)
        )
        shapes |= _linear(f"{block}mlp.w1", hidden, width) | _linear(f"{block}mlp.w2", hidden, width)
        shapes |= _norm(f"{block}mlp.ffn_ln", hidden) | _linear(f"{block}mlp.w3", width, hidden)
    return shapes


def _siglip(width, layers, patch, grid, projection, head_width):
    hidden, trunk = int(width * 3.7362), "visual.trunk."
    shapes = {
        f"{trunk}pos_embed": (1, grid * grid, width),
        f"{trunk}patch_embed.proj.weight": (width, 3, patch, patch),
        f"{trunk}patch_embed.proj.bias": (width,),
        **_norm(f"{trunk}norm", width),
        f"{trunk}attn_pool.latent": (1, 1, width),
        **_linear(f"{trunk}attn_pool.q", width, width),
        **_linear(f"{trunk}attn_pool.kv", 2 * width, width),
        **_linear(f"{trunk}attn_pool.proj", width, width),
        **_norm(f"{trunk}attn_pool.norm", width),
        **_linear(f"{trunk}attn_pool.mlp.fc1", hidden, width),
        **_linear(f"{trunk}attn_pool.mlp.fc2", width, hidden),
    }
    for i in range(layers):
        block = f"{trunk}blocks.{i}."
        shapes |= _norm(f"{block}norm1", width) | _norm(f"{block}norm2", width)
        shapes |= _linear(f"{block}attn.qkv", 3 * width, width) | _linear(f"{block}attn.proj", width, width)
        shapes |= _linear(f"{block}mlp.fc1", hidden, width) | _linear(f"{block}mlp.fc2", width, hidden)
    return shapes


def write_checkpoint(file: Path, **sizes) -> int:
    """Write random fp16 weights; returns the bytes of the largest tensor."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: (torch.randn(shape, generator=generator) / 10).half()
        for name, shape in published_shapes(**sizes).items()
    }
    # The converter compares rotary tables with its own.
    if sizes["kind"] == "eva":
        cos, sin = rotary_tables(sizes["image"] // sizes["patch"], sizes["head_width"], 16)
        tables = {"rope.freqs_cos": cos.half(), "rope.freqs_sin": sin.half()}
        state |= {name: table.clone() for suffix, table in tables.items() for name in state if name.endswith(suffix)}
    torch.save(state, file)
    return max(tensor.numel() * tensor.element_size() for tensor in state.values())


def measure(program: str, arguments: list[str], output: Path) -> tuple[float, float]:
    """Seconds and bytes that the program prints; what it wrote is removed."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    subprocess.run(["rm", "-rf", str(output), f"{output}-small"], check=True)
    seconds, size = map(float, done.stdout.split())
    return seconds, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", choices=CHECKPOINTS, nargs="*", default=list(CHECKPOINTS))
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    rows, lines = [], []
    with tempfile.TemporaryDirectory() as folder:
        source, small, output = (Path(folder) / name for name in ("published.pt", "small.pt", "out"))
        write_checkpoint(
            small, kind="openai", width=32, layers=2, patch=8, image=32, projection=16, llm=24, head_width=8
        )
        for name in options.only:
            largest = write_checkpoint(source, llm=LLM_SIZE, **CHECKPOINTS[name])
            size = source.stat().st_size
            arguments = [str(source), str(small), str(output), str(CHECKPOINTS[name]["head_width"])]
            # In turn, so that noise of the machine meets both.
            runs = [[measure(program, arguments, output) for program in (OURS, PEER)] for _ in range(options.repeat)]
            ours, peer = zip(*runs)
            (our_time, our_memory), (peer_time, peer_memory) = (
                (min(t for t, _ in r), max(m for _, m in r)) for r in (ours, peer)
            )
            for what, a, b, unit in (
                ("time", our_time, peer_time, "s"),
                ("peak memory", our_memory / 1e6, peer_memory / 1e6, "MB"),
            ):
                rows.append({"name": f"{name}, {what}", "ours": a, "peer": b, "ratio": b / a, "unit": unit})
            lines.append(
                f"| {name} | {size / 1e6:,.0f} | {our_time:.1f} | {our_memory / 1e6:,.0f} | {(size + largest) / 1e6:,.0f} | {peer_time:.1f} | "
                f"{peer_memory / 1e6:,.0f} |"
            )
            print(lines[-1], flush=True)
            source.unlink()
    machine = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    options.json.write_text(
        json.dumps({"machine": machine | {"date": time.strftime("%Y-%m-%d")}, "rows": rows}, indent=2)
    )


def processor_name() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
