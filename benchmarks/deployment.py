"""What each way to run a checkpoint on the CPU costs in score, memory and time: float32, bfloat16, ONNX, int8 and int4.

    pip install "proclip-transformers[onnx,quickstart]" torchao
    python benchmarks/deployment.py quickstart-output/proclip --json deployment.json

The score is the quickstart's table: its images and texts are drawn anew, by the seed. The peer is the model in float32. Memory is that of the weights of
the text side. Time is of all texts, sorted by length, 16 in a batch.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from transformers import AutoModel, AutoProcessor, BatchFeature

from modeling_proclip import ProCLIPModel
from trainers.export.onnx import FILES, export_onnx
from trainers.openmoji.task import SIZES, ImageDataset, Task, make_task
from trainers.quickstart.evaluate import score


BATCH = 16
MEASURES = ("zero_shot_seen", "zero_shot_unseen", "i2t_r@1", "t2i_r@1")

# Tokens or pixels to embeddings.
Embed = Callable[[BatchFeature], torch.Tensor]


class Variant:
    """One way to run the checkpoint: both sides, and the bytes of the text side's weights."""

    def __init__(self, embed_text: Embed, embed_image: Embed, num_bytes: int):
        self.embed_text, self.embed_image, self.num_bytes = embed_text, embed_image, num_bytes


def eager(folder: str, dtype: torch.dtype, change: Callable[[ProCLIPModel], None] = lambda model: None) -> Variant:
    model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    change(model)
    tensors = [*model.text_model.parameters(), *model.text_model.buffers(), *model.text_adapter.parameters()]
    return Variant(
        lambda tokens: model.get_text_features(**tokens).pooler_output.float(),
        lambda pixels: model.get_image_features(pixel_values=pixels["pixel_values"].to(dtype)).pooler_output.float(),
        sum(stored_bytes(tensor) for tensor in tensors),
    )


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of torchao's, those of its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def torchao(folder: str, configuration: str, **arguments: Any) -> Variant:
    """The LLM's linear layers by torchao. Its embedding table stays as it is."""
    import torchao.quantization as quantization

    if group := arguments.pop("group", None):
        arguments["granularity"] = quantization.PerGroup(group)
    config = getattr(quantization, configuration)(**arguments)
    return eager(folder, torch.float32, lambda model: quantization.quantize_(model.text_model, config))


def onnx(folder: str, exported: Path, quantize: Any = None) -> Variant:
    if not exported.exists():
        export_onnx(folder, exported, quantize)
    sessions = {side: onnxruntime.InferenceSession(exported / file) for side, file in FILES.items()}

    def run(side: str, inputs: BatchFeature) -> torch.Tensor:
        return torch.from_numpy(sessions[side].run(None, {k: v.numpy() for k, v in inputs.items()})[0])

    files = exported.glob(FILES["text"] + "*")
    size = sum(file.stat().st_size for file in files)
    return Variant(lambda tokens: run("text", tokens), lambda pixels: run("image", pixels), size)


def variants(folder: str, scratch: Path) -> Iterator[tuple[str, Callable[[], Variant]]]:
    yield "float32", lambda: eager(folder, torch.float32)
    yield "bfloat16", lambda: eager(folder, torch.bfloat16)
    yield "ONNX", lambda: onnx(folder, scratch / "float32")
    yield "ONNX int8", lambda: onnx(folder, scratch / "int8", "int8")
    yield "torchao int8 weights", lambda: torchao(folder, "Int8WeightOnlyConfig")
    yield "torchao int8", lambda: torchao(folder, "Int8DynamicActivationInt8WeightConfig")
    yield (
        "torchao int4 weights",
        lambda: torchao(folder, "IntxWeightOnlyConfig", weight_dtype=torch.int4, group=32),
    )


@torch.inference_mode()
def measure(variant: Variant, processor: Any, task: Task, pixels: torch.Tensor) -> dict[str, float]:
    seconds, num_texts = 0.0, 0
    known: dict[str, torch.Tensor] = {}

    def embed_texts(texts: list[str]) -> torch.Tensor:
        nonlocal seconds, num_texts
        new = sorted({text for text in texts if text not in known}, key=len)
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            tokens = processor(text=batch, return_tensors="pt")
            began = time.perf_counter()
            known.update(zip(batch, variant.embed_text(tokens)))
            seconds += time.perf_counter() - began
            num_texts += len(batch)
        return torch.stack([known[text] for text in texts])

    images = torch.cat([variant.embed_image(BatchFeature({"pixel_values": part})) for part in pixels.split(64)])
    row = score(task, images, embed_texts)
    return {name: row[name] for name in MEASURES} | {
        "MB": variant.num_bytes / 1e6,
        "ms a text": 1000 * seconds / num_texts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="such as quickstart-output/proclip")
    parser.add_argument("--size", choices=SIZES, default="full", help="of the quickstart's table (default full)")
    parser.add_argument("--only", nargs="*", help="names of variants (default: all)")
    parser.add_argument("--exports", type=Path, help="folder that keeps the ONNX files (default: a temporary one)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    task = make_task(SIZES[args.size], seed=0)
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    pixels = ImageDataset(task, task.test, processor.image_processor).pixel_values
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "size": args.size,
    }
    print(f"{'':22} {'seen':>7} {'unseen':>7} {'i2t@1':>7} {'t2i@1':>7} {'MB':>7} {'ms/text':>8}")
    peer: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, make in variants(args.checkpoint, args.exports or Path(scratch)):
            if args.only and name not in args.only:
                continue
            try:
                variant = make()
            except (ValueError, ImportError) as error:  # refused by the export's own check, or not installed
                print(f"{name:22} {error}", flush=True)
                continue
            found = measure(variant, processor, task, pixels)
            peer = peer or found
            print(
                f"{name:22} "
                + " ".join(f"{found[key]:7.3f}" for key in MEASURES)
                + f" {found['MB']:7,.0f} {found['ms a text']:8.1f}",
                flush=True,
            )
            for key, value in found.items():
                better = value / peer[key] if key in MEASURES else peer[key] / value
                rows.append({"name": f"{name}: {key}", "ours": value, "peer": peer[key], "ratio": better, "unit": key})
            if args.json:
                args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
