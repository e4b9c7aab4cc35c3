"""Peak memory and time of a training step with float32 weights, plain and under autocast, and with bfloat16 weights and float32 copies.

    python benchmarks/master_weights.py --json master_weights.json [--rows 8 32] [--steps 2] [--threads 1]

A ViT-B/32 and AdamW; the loss is the mean of the squared embeddings. "bfloat16 + copies" is what a mixed-precision optimizer does: weights and
gradients in bfloat16, a float32 copy of the weights beside AdamW's two moments; gradients are converted one weight at a time. Memory is the
peak of PyTorch's allocator, weights included; time is that of the processor on a CPU, else of the clock.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPVisionConfig, CLIPVisionModel


GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Step = Callable[[], None]


def make_model(dtype: torch.dtype) -> CLIPVisionModel:
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(patch_size=32)).to(DEVICE, dtype).train()


def backward(model: CLIPVisionModel, pixels: torch.Tensor, autocast: bool) -> None:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        loss = model(pixel_values=pixels.to(model.dtype)).pooler_output.float().square().mean()
    loss.backward()


def float32_weights(pixels: torch.Tensor, autocast: bool) -> tuple[torch.nn.Module, Step]:
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=False)

    def step() -> None:
        backward(model, pixels, autocast)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def bfloat16_weights(pixels: torch.Tensor) -> tuple[torch.nn.Module, Step]:
    model = make_model(torch.bfloat16)
    weights = list(model.parameters())
    copies = [weight.detach().float() for weight in weights]
    optimizers = [torch.optim.AdamW([copy], lr=1e-5, foreach=False) for copy in copies]

    def step() -> None:
        backward(model, pixels, autocast=False)
        for weight, copy, optimizer in zip(weights, copies, optimizers, strict=True):
            if weight.grad is not None:
                copy.grad, weight.grad = weight.grad.float(), None
                optimizer.step()
                copy.grad = None
                weight.data.copy_(copy)

    return model, step


def peak_memory(make: Callable[[], tuple[torch.nn.Module, Step]]) -> int:
    """Bytes at the peak of two steps, from before the model is made."""
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _, step = make()
        step(), step()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _, step = make()
        step(), step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def now() -> float:
    """Seconds; on a CPU of the processor, which other programs disturb less."""
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds_a_step(make: Callable[[], tuple[torch.nn.Module, Step]], steps: int) -> float:
    _, step = make()
    step()
    times = []
    for _ in range(steps):
        started = now()
        step()
        times.append(now() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32], help="images of a step")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = []
    for rows in options.rows:
        pixels = torch.randn(rows, 3, 224, 224, device=DEVICE)
        ways = {
            "float32": partial(float32_weights, pixels, autocast=False),
            "float32, autocast": partial(float32_weights, pixels, autocast=True),
            "bfloat16 + copies": partial(bfloat16_weights, pixels),
        }
        measured = {
            name: (peak_memory(make) / 1e6, seconds_a_step(make, options.steps)) for name, make in ways.items()
        }
        peer_memory, peer_seconds = measured["float32, autocast"]
        for name, (memory, seconds) in measured.items():
            print(f"{rows:5} images, {name:18} {memory:8,.0f} MB  {seconds:7.2f} s a step", flush=True)
            title = f"{rows} images: {name}"
            for kind, ours, peer, unit in (
                ("memory", memory, peer_memory, "MB"),
                ("time", seconds, peer_seconds, "s"),
            ):
                table.append(
                    {"name": f"{title}, {kind}", "ours": ours, "peer": peer, "ratio": peer / ours, "unit": unit}
                )
    if options.json:
        device = torch.cuda.get_device_name() if GPU else platform.processor() or platform.machine()
        machine = {"device": device, "threads": options.threads, "torch": torch.__version__}
        options.json.write_text(json.dumps({"machine": machine, "rows": table}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
