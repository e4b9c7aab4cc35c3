"""Memory and time of a step of stage 2 with gradient caching at batch 4,096, against the plain step at 64.

    python benchmarks/gradient_caching.py --json gradient_caching.json [--batch-size 4096] [--micro-batch-size 64] [--rounds 1] [--threads 2]

The whole step of `ContrastiveTuningTrainer`, method "proclip": image encoder and adapter, InfoNCE, the distillation from the EMA teacher with
its structure loss, backward, AdamW, and the teacher's update, in float32. The image encoder is a ViT as small as two cores need for a
benchmark of minutes: 50 tokens as a ViT-B/32 has, width 256, 6 layers; the embeddings have the 512 dimensions of CLIP's B models. In a larger
encoder the losses and the embeddings weigh less, so both ratios fall.

Memory: each kind in a process of its own: the growth of the residency from before the first step, gradients and the optimizer's moments
included, up to its peak (/proc, Linux), over five plain steps or one cached step. The batch
of pictures itself lies in the host's memory, is printed, and counts for neither side. The limit is 1.3 times (plain step at 64, plus the
embeddings v, t and v* of the whole batch).

Time: in one process, plain steps before and after every cached one, so that the noise of the machine meets both; per sample. By processor
time as well, which other work on the machine disturbs less. The limit is 1.4 times the plain step's.
"""

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from modeling_proclip import ProCLIPConfig, ProCLIPModel
from trainers import ContrastiveTuningConfig, ContrastiveTuningTrainer


IMAGE_SIZE, LLM_SIZE, DIM = 112, 576, 512
VISION = {
    "model_type": "clip_vision_model",
    "image_size": IMAGE_SIZE,
    "patch_size": 16,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}
TEXT = {"model_type": "llama", "hidden_size": LLM_SIZE, "num_hidden_layers": 1, "num_attention_heads": 9}
MEMORY_LIMIT, TIME_LIMIT = 1.3, 1.4


class Store:
    """A text store that knows every text."""

    def lookup(self, texts: list[str]) -> torch.Tensor:
        return torch.randn(len(texts), LLM_SIZE)


class Rows:
    """As many rows as a batch; the benchmark makes its own batches."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        return {"text": str(index), "pixel_values": torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)}


def batch_of(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(rows, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {"pixel_values": pixels, "llm_embeds": torch.randn(rows, LLM_SIZE, generator=generator)}


class Steps:
    """Steps of one trainer, plain or cached by the size of the batch."""

    def __init__(self, batch_size: int, micro_batch_size: int, folder: str):
        torch.manual_seed(0)
        config = ProCLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=DIM)
        args = ContrastiveTuningConfig(
            folder,
            use_cpu=True,
            report_to="none",
            per_device_train_batch_size=batch_size,
            gradient_caching_batch_size=micro_batch_size,
        )
        model = ProCLIPModel(config, load_text_model=False)
        self.trainer = ContrastiveTuningTrainer(model, args, Rows(batch_size), text_store=Store())
        self.trainer.current_gradient_accumulation_steps = 1  # which train() would set
        self.optimizer = self.trainer.create_optimizer()

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        self.trainer.training_step(self.trainer.model, batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.trainer.after_optimizer_step()


def resident(field: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at most so far."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure_memory(steps: Steps, batch_size: int, micro_batch_size: int) -> dict[str, float]:
    batch = batch_of(batch_size)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(1 if batch_size > micro_batch_size else 5):
        steps.step(batch)
    return {"growth": resident("VmHWM") - before, "batch": sum(side.nbytes for side in batch.values())}


def measure_time(steps: Steps, batch_size: int, micro_batch_size: int) -> dict[str, float]:
    small, large = batch_of(micro_batch_size), batch_of(batch_size)
    plain_steps = max(1, batch_size // micro_batch_size // 8)
    steps.step(small)

    def per_sample(batch: dict[str, torch.Tensor], times: int) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(times):
            steps.step(batch)
        samples = times * len(batch["llm_embeds"])
        return (time.perf_counter() - wall) / samples, (time.process_time() - cpu) / samples

    before, cached, after = per_sample(small, plain_steps), per_sample(large, 1), per_sample(small, plain_steps)
    plain = [(a + b) / 2 for a, b in zip(before, after, strict=True)]
    return {"plain": plain[0], "cached": cached[0], "plain_cpu": plain[1], "cached_cpu": cached[1]}


def measure(kind: str, options: argparse.Namespace) -> dict[str, float]:
    """In a process of its own."""
    rows = options.micro_batch_size if kind == "plain memory" else options.batch_size
    names = ("--batch-size", rows, "--micro-batch-size", options.micro_batch_size, "--threads", options.threads)
    command = [sys.executable, __file__, "--measure", kind, *map(str, names)]
    # glibc keeps what is freed for later, in holes that larger tensors do not fit into. So that the residency is what tensors take, both sides
    # give tensors of a megabyte back at once. It costs time, so times are measured without.
    returned = {} if kind == "time" else {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **returned})
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, ours: float, peer: float, unit: str, limit: float) -> dict:
    return {"name": name, "ours": ours, "peer": peer, "ratio": peer / ours, "unit": unit, "limit": limit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", choices=["plain memory", "cached memory", "time"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        torch.set_num_threads(options.threads)
        with tempfile.TemporaryDirectory() as folder:
            steps = Steps(options.batch_size, options.micro_batch_size, folder)
            of_kind = measure_time if options.measure == "time" else measure_memory
            print(json.dumps(of_kind(steps, options.batch_size, options.micro_batch_size)))
        return

    plain, cached = (measure(f"{kind} memory", options) for kind in ("plain", "cached"))
    embeds = 3 * options.batch_size * DIM * 4
    print(
        f"the batch of {options.batch_size} lies in {cached['batch'] / 1e6:.0f} MB, one of {options.micro_batch_size} in "
        f"{plain['batch'] / 1e6:.0f} MB; the embeddings are {embeds / 1e6:.0f} MB"
    )
    print(f"a plain step grows by {plain['growth'] / 1e6:.0f} MB, a cached one by {cached['growth'] / 1e6:.0f} MB")
    memory = row("peak memory of a step", cached["growth"] / 1e6, (plain["growth"] + embeds) / 1e6, "MB", MEMORY_LIMIT)
    rows = [memory]
    for number in range(options.rounds):
        times = measure("time", options)
        name = f"time a sample, round {number + 1}"
        rows.append(row(name, 1e3 * times["cached"], 1e3 * times["plain"], "ms", TIME_LIMIT))
        rows.append(row(f"{name}, processor", 1e3 * times["cached_cpu"], 1e3 * times["plain_cpu"], "ms", TIME_LIMIT))
    for each in rows:
        verdict = "within" if each["ours"] <= each["limit"] * each["peer"] else "BEYOND"
        print(
            f"{each['name']:36s} {each['ours']:9.2f} against {each['peer']:9.2f} {each['unit']}: {each['ours'] / each['peer']:.2f} times, "
            f"{verdict} {each['limit']}"
        )
    if options.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "threads": options.threads,
            "torch": torch.__version__,
        }
        machine["date"] = time.strftime("%Y-%m-%d")
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
