"""Time and peak memory of the contrastive losses at large batches: in blocks of rows, as a whole matrix, compiled, and by a fused kernel.

    python benchmarks/losses.py --json losses.json                                  # CPU: 8,192 pairs; GPU: 4,096, 16,384 and 32,768
    pip install siglip-kernel==0.1.2 && python benchmarks/losses.py --json losses.json  # on a GPU, with the fused kernel too

Forward and backward of InfoNCE and of the sigmoid loss with a learned scale and bias, for embeddings of 768 dimensions. "ours" is `trainers.losses`, which
computes a block of rows at a time, and again in the backward pass, in float32. "whole" is the loss as open_clip's `ClipLoss` and `SigLipLoss` write it
with one process: the matrix of all logits at once. "compiled" is that by `torch.compile`. `siglip-kernel` (Apache-2.0, Triton, needs a GPU) has
the sigmoid loss alone; it takes the embeddings as they are, so it is run in float32 and in bfloat16. Each loss and gradient is compared with ours.

Memory is what a way takes beside its inputs at its peak. Time is that of the processor on a CPU, else of the clock; the best of `--rounds`.
No GPU has run this yet.
"""

import argparse
import importlib.util
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from trainers.losses import info_nce_loss, sigmoid_loss


GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SCALE, BIAS = 10.0, -10.0
# From images and texts `(n, dim)`, the logarithm of the scale and the bias, to the loss `()`.
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def whole_info_nce(
    images: torch.Tensor, texts: torch.Tensor, log_scale: torch.Tensor, _: torch.Tensor
) -> torch.Tensor:
    logits = log_scale.exp() * images @ texts.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def whole_sigmoid(
    images: torch.Tensor, texts: torch.Tensor, log_scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    logits = log_scale.exp() * images @ texts.T + bias
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def ways() -> Iterator[tuple[str, str, torch.dtype, Loss]]:
    """The loss's name, the way, the dtype of its inputs, and the function; ours comes first."""
    ours: dict[str, Loss] = {
        "InfoNCE": lambda images, texts, log_scale, _: info_nce_loss(images, texts, log_scale.exp()),
        "sigmoid": lambda images, texts, log_scale, bias: sigmoid_loss(images, texts, log_scale.exp(), bias),
    }
    whole: dict[str, Loss] = {"InfoNCE": whole_info_nce, "sigmoid": whole_sigmoid}
    for name in ours:
        yield name, "ours", torch.float32, ours[name]
        yield name, "whole", torch.float32, whole[name]
        yield name, "compiled", torch.float32, torch.compile(whole[name])
    if GPU and importlib.util.find_spec("siglip_kernel"):
        from siglip_kernel import fused_siglip_loss

        yield "sigmoid", "siglip-kernel, float32", torch.float32, fused_siglip_loss
        yield "sigmoid", "siglip-kernel, bfloat16", torch.bfloat16, fused_siglip_loss


def make_inputs(num_pairs: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    sides = [F.normalize(torch.randn(num_pairs, dim, device=DEVICE), dim=1).to(dtype) for _ in range(2)]
    scalars = [torch.tensor(SCALE, device=DEVICE).log(), torch.tensor(BIAS, device=DEVICE)]
    return [tensor.requires_grad_() for tensor in (*sides, *scalars)]


def step(loss_fn: Loss, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and its gradient with respect to the images."""
    loss = loss_fn(*inputs)
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return loss.detach(), gradients[0]


def peak_memory(loss_fn: Loss, inputs: list[torch.Tensor]) -> int:
    """Bytes beside the inputs."""
    if GPU:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(loss_fn, inputs)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(loss_fn, inputs)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def now() -> float:
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(num_pairs: int, dim: int, rounds: int) -> Iterator[dict]:
    """Rows of the table, each way against ours."""
    ours: dict[str, tuple[float, float, torch.Tensor, torch.Tensor]] = {}
    for name, way, dtype, loss_fn in ways():
        inputs = make_inputs(num_pairs, dim, dtype)
        try:
            loss, gradient = step(loss_fn, inputs)  # which compiles
            seconds = []
            for _ in range(rounds):
                started = now()
                step(loss_fn, inputs)
                seconds.append(now() - started)
            memory = peak_memory(loss_fn, inputs)
        except torch.OutOfMemoryError:
            print(f"{num_pairs:7,} {name:8} {way:24} does not fit", flush=True)
            torch.cuda.empty_cache()
            continue
        here = (min(seconds), memory / 1e6, loss, gradient)
        of_ours = ours.setdefault(name, here)
        off = ((gradient - of_ours[3]).norm() / of_ours[3].norm()).item()
        print(
            f"{num_pairs:7,} {name:8} {way:24} {here[0]:8.3f} s {here[1]:9,.0f} MB  gradient off by {off:.1e}",
            flush=True,
        )
        if way == "ours":
            continue
        for kind, place, unit in (("time", 0, "s"), ("memory", 1, "MB")):
            title = f"{num_pairs} pairs, {name}, {kind} against {way}"
            yield {
                "name": title,
                "ours": of_ours[place],
                "peer": here[place],
                "ratio": here[place] / of_ours[place],
                "unit": unit,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--pairs", type=int, nargs="+", default=[4096, 16384, 32768] if GPU else [8192])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=10 if GPU else 2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for num_pairs in options.pairs for row in measure(num_pairs, options.dim, options.rounds)]
    if options.json:
        device = torch.cuda.get_device_name() if GPU else platform.processor() or platform.machine()
        machine = {"device": device, "threads": options.threads, "torch": torch.__version__}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
