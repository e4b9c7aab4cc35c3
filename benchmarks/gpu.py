"""Texts and training on a GPU: plain, padded, packed, compiled and by flash-attn, side by side in one run.

    python benchmarks/gpu.py --json gpu.json    # six minutes on an H100; --quick for one

Texts: `encode_texts` of a Llama with random weights in bfloat16, of 8B shape (1B with --quick), tokens a second and the share of the card's
own matmul rate: 2 x parameters without embeddings x tokens, plus the attention's two products, over the time and the rate of an 8,192 cubed
matmul. The plain loop pads 32 texts at a time in the order that they come in, as most scripts do; sentence-transformers sorts and pads 32, and the model packs them.
Packed embeddings are compared with padded ones.

Training: `ContrastiveTuningTrainer.train()` with a ViT-L/14 at 224 (ViT-B/32 with --quick), images a second after the first steps, against a
plain loop of the same loss, with the share of the matmul rate, the peak of the card's memory and the share of the time spent waiting for
data. A backward pass counts as two forward passes, the EMA teacher's forward pass and that of gradient caching as one each. The LLM's
embeddings are looked up, so it takes no part.

Without a GPU it runs on the CPU at tiny sizes, to see that it does; those numbers mean nothing.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPImageProcessorPil

from modeling_proclip import ProCLIPConfig, ProCLIPModel, ProCLIPProcessor
from modeling_proclip.packing import why_padded
from trainers import ContrastiveTuningConfig, ContrastiveTuningTrainer
from trainers.compute.compiled import compile_layers
from trainers.data import encode_texts
from trainers.losses import info_nce_loss


GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
TOKENIZER = Path(__file__).parents[1] / "trainers/quickstart/assets/emoji-clip"
# Name -> mean number of words, tokens that are the most of a text, and texts.
TEXTS = {
    "short captions": (12, 64, 4096),
    "captions": (70, 256, 2048),
    "dense captions": (430, 1024, 512),
    "long": (2300, 4096, 96),
}
LLMS = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
VISION = {
    "L/14": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "B/32": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 32,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 112,
    },
}
IMAGE_SIZE = 224
LLM_SIZE, DIM = (4096, 768) if GPU else (64, 32)


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def timed(run: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds that `run(*arguments)` takes, and what it returns."""
    synchronize()
    started = time.perf_counter()
    result = run(*arguments)
    synchronize()
    return time.perf_counter() - started, result


def matmul_rate(size: int) -> float:
    """FLOP/s of a square matmul in the dtype of the models, the best of six."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return 2 * size**3 / min(timed(torch.matmul, a, b)[0] for _ in range(6))


# Texts


def make_model(size: str, attention: str | None = None) -> ProCLIPModel:
    """A ProCLIP whose LLM has random weights."""
    torch.manual_seed(0)
    vocab_size = len(AutoTokenizer.from_pretrained(TOKENIZER))
    text = {"model_type": "llama", **LLMS[size], "vocab_size": vocab_size, "max_position_embeddings": 8192}
    vision = {"model_type": "clip_vision_model", **VISION["tiny"], "image_size": IMAGE_SIZE}
    given = {} if attention is None else {"attn_implementation": {"text_config": attention}}
    config = ProCLIPConfig(vision_config=vision, text_config=text, dtype=DTYPE, **given)
    with DEVICE:
        return ProCLIPModel(config, dtypes={"vision_config": DTYPE, "text_config": DTYPE}).eval()


def make_processor(max_length: int) -> ProCLIPProcessor:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    return ProCLIPProcessor(CLIPImageProcessorPil(), tokenizer, prompt_template="{text}", max_length=max_length)


def make_texts(mean_words: int, count: int) -> list[str]:
    """Made-up texts of log-normally distributed length, the same at every run."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(count, generator=generator) * 0.5 - 0.125).exp() * mean_words
    words = "a red fox and two boats under the old bridge near some houses with small blue doors".split()
    return [
        " ".join(words[i] for i in torch.randint(len(words), (max(int(length), 1),), generator=generator))
        for length in lengths
    ]


def flops_of(model: ProCLIPModel, lengths: Sequence[int]) -> float:
    """Operations of one forward pass over texts of so many tokens, without padding."""
    config = model.text_model.config
    weights = (
        sum(p.numel() for p in model.text_model.parameters()) - model.text_model.get_input_embeddings().weight.numel()
    )
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 2 * weights * sum(lengths) + attention * sum(length**2 for length in lengths)


@torch.no_grad()
def plain_loop(model: ProCLIPModel, processor: ProCLIPProcessor, texts: list[str]) -> torch.Tensor:
    """32 texts at a time, padded."""
    parts = []
    for start in range(0, len(texts), 32):
        rows = processor(text=texts[start : start + 32], return_tensors="pt").to(DEVICE)
        parts.append(model.get_llm_embeds(**rows).float().cpu())
    return torch.cat(parts)


def encoded(model: ProCLIPModel, processor: ProCLIPProcessor, texts: list[str], **options: Any) -> torch.Tensor:
    embeds = torch.empty(len(texts), model.config.text_config.hidden_size)
    for batch in encode_texts(texts, model, processor, **options):
        embeds[batch.indices] = batch.embeddings.float().cpu()
    return embeds


def sentence_transformer(model: ProCLIPModel, processor: ProCLIPProcessor) -> Any:
    """One that runs `model`: loaded from a tiny checkpoint of the same kind, with `model` in its place."""
    from sentence_transformers import SentenceTransformer

    with tempfile.TemporaryDirectory() as folder:
        make_model("tiny").save_pretrained(folder)
        processor.save_pretrained(folder)
        loaded = SentenceTransformer(folder, device=str(DEVICE))
    loaded[0].model = model
    return loaded


def text_ways(model: ProCLIPModel, processor: ProCLIPProcessor) -> Iterator[tuple[str, Callable[[list[str]], Any]]]:
    """The ways to embed texts, one after the other; layers are compiled for the last of them."""
    yield "plain loop", lambda texts: plain_loop(model, processor, texts)
    if importlib.util.find_spec("sentence_transformers"):
        peer = sentence_transformer(model, processor)
        yield "sentence-transformers", lambda texts: peer.encode(texts, batch_size=32)
    yield "padded", lambda texts: encoded(model, processor, texts, packed=False)
    if why_padded(model.text_model) is None:
        yield "packed", lambda texts: encoded(model, processor, texts, packed=True)
        if GPU:
            for name in ("flash_attention_2", "flash_attention_3"):
                try:
                    model.text_model.set_attn_implementation(name)
                except (ImportError, ValueError):
                    continue
                yield f"packed, {name}", lambda texts: encoded(model, processor, texts, packed=True)
            model.text_model.set_attn_implementation("sdpa")
            compile_layers(model.text_model)
            yield "packed, layers compiled", lambda texts: encoded(model, processor, texts, packed=True)


def measure_texts(size: str, sets: Sequence[str], share_of_texts: float, rate: float) -> list[dict[str, Any]]:
    model, rows, reference = make_model(size), [], {}
    for way, run in text_ways(model, processor := make_processor(4096)):
        for name in sets:
            mean_words, most, count = TEXTS[name]
            processor.max_length = most
            texts = make_texts(mean_words, max(int(count * share_of_texts), 8))
            lengths = [len(ids) for ids in processor(text=texts, padding=False)["input_ids"]]
            run(texts[: max(len(texts) // 8, 2)])
            seconds, reference[way, name] = timed(run, texts)
            speed, share = sum(lengths) / seconds, flops_of(model, lengths) / seconds / rate
            plain = next((row for row in rows if row["name"].startswith(name + ":")), None)
            rows.append(
                {
                    "name": f"{name}: {way}",
                    "ours": speed,
                    "peer": plain["ours"] if plain else speed,
                    "ratio": speed / plain["ours"] if plain else 1.0,
                    "unit": "tokens/s",
                    "mean_tokens": statistics.mean(lengths),
                    "share_of_matmul_rate": share,
                }
            )
            if way.startswith("packed"):
                rows[-1]["smallest_cosine_to_padded"] = (
                    F.cosine_similarity(reference[way, name], reference["padded", name]).min().item()
                )
            print(f"{name:16} {way:26} {speed:10,.0f} tokens/s  {share:.2f} of the matmul rate", flush=True)
    return rows


# Training


class Store:
    """A text store that knows every text."""

    def __init__(self):
        self.embeds = torch.randn(1024, LLM_SIZE, generator=torch.Generator().manual_seed(0))

    def lookup(self, texts: list[str]) -> torch.Tensor:
        return self.embeds[[int(text) % 1024 for text in texts]]


class Rows:
    """Rows whose pixels are there already: what is measured is the chip, not the reading of images."""

    pixels = torch.randn(8, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": str(index), "pixel_values": self.pixels[index % 8]}


def training_model(size: str) -> ProCLIPModel:
    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", **VISION[size], "image_size": IMAGE_SIZE}
    text = {"model_type": "llama", "hidden_size": LLM_SIZE, "num_hidden_layers": 1, "vocab_size": 8}
    return ProCLIPModel(
        ProCLIPConfig(vision_config=vision, text_config=text, projection_dim=DIM, dtype="float32"),
        load_text_model=False,
    )


def image_flops(model: ProCLIPModel) -> float:
    """Of one forward pass of the image encoder over one image."""
    config = model.config.vision_config
    num_tokens = (IMAGE_SIZE // config.patch_size) ** 2 + 1
    weights = sum(p.numel() for name, p in model.vision_model.named_parameters() if "embeddings" not in name)
    return 2 * weights * num_tokens + 4 * config.num_hidden_layers * config.hidden_size * num_tokens**2


def trained(size: str, batch_size: int, steps: int, **settings: Any) -> dict[str, float]:
    """The last log of `steps` steps of the trainer, which is of their second half."""
    with tempfile.TemporaryDirectory() as folder:
        args = ContrastiveTuningConfig(
            folder,
            per_device_train_batch_size=batch_size,
            max_steps=steps,
            logging_steps=max(steps // 2, 1),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=GPU,
            dataloader_num_workers=4 if GPU else 0,
            **settings,
        )
        trainer = ContrastiveTuningTrainer(training_model(size), args, Rows(), text_store=Store())
        trainer.train()
        return [log for log in trainer.state.log_history if "samples_per_second" in log][-1]


def plain_training(size: str, batch_size: int, steps: int) -> float:
    """Images a second of a loop with the same model and InfoNCE, as short as one can write it."""
    model = training_model(size).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    pixels = Rows.pixels.to(DEVICE).repeat(batch_size // 8 + 1, 1, 1, 1)[:batch_size]
    embeds = torch.randn(batch_size, LLM_SIZE, device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            outputs = model(pixel_values=pixels, llm_embeds=embeds)
        info_nce_loss(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return batch_size * steps / timed(lambda: [step() for _ in range(steps)])[0]


def measure_training(size: str, batch_size: int, steps: int, quick: bool, rate: float) -> list[dict[str, Any]]:
    """The trainer's methods, and a batch eight times as large in cached parts, against the plain loop."""
    cached, compiled = {"gradient_caching_batch_size": batch_size}, {"torch_compile": True}
    # Name -> rows of a batch, settings, and forward passes that an image costs.
    ways: dict[str, tuple[int, dict[str, Any], int]] = {
        "LLM2CLIP": (batch_size, {"method": "llm2clip"}, 3),
        "ProCLIP": (batch_size, {}, 4),
        "ProCLIP, cached": (8 * batch_size, cached, 5),
    }
    if GPU and not quick:
        ways["ProCLIP, compiled"] = (batch_size, compiled, 4)
        ways["ProCLIP, cached, compiled"] = (8 * batch_size, {**cached, **compiled}, 5)
    flops = image_flops(training_model(size))
    peer, rows = plain_training(size, batch_size, steps), []
    print(f"{'plain loop':26} {peer:10,.1f} images/s  {3 * flops * peer / rate:.3f} of the matmul rate", flush=True)
    for name, (rows_a_batch, settings, passes) in ways.items():
        if GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        log = trained(size, rows_a_batch, max(steps * batch_size // rows_a_batch, 4), **settings)
        speed = log["samples_per_second"]
        share, memory = passes * flops * speed / rate, torch.cuda.max_memory_allocated() / 1e9 if GPU else None
        rows.append(
            {
                "name": f"stage 2: {name}",
                "ours": speed,
                "peer": peer,
                "ratio": speed / peer,
                "unit": "images/s",
                "share_of_matmul_rate": share,
                "data_wait": log["data_wait"],
                "peak_memory_gb": memory,
            }
        )
        peak = "" if memory is None else f", {memory:.0f} GB"
        print(
            f"{name:26} {speed:10,.1f} images/s  {share:.3f} of the matmul rate{peak}, {speed / peer:.2f} of the plain loop, "
            f"{log['data_wait']:.0%} of the time waiting for data",
            flush=True,
        )
    return rows


def main() -> None:
    """Runs both parts, prints their tables and writes them to the file named by --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument(
        "--quick", action="store_true", help="a smaller LLM and image encoder, fewer texts: one minute"
    )
    arguments = parser.parse_args()
    machine = {
        "device": torch.cuda.get_device_name() if GPU else "CPU, tiny sizes: no measurement",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(DTYPE).removeprefix("torch."),
    }
    print(machine, flush=True)
    rate = matmul_rate(8192 if GPU else 256)
    machine["matmul_tflops"] = rate / 1e12
    llm, vision, batch_size, steps, share = ("8B", "L/14", 128, 20, 1.0) if GPU else ("tiny", "tiny", 8, 4, 0.002)
    sets = list(TEXTS)
    if arguments.quick and GPU:
        llm, vision, steps, share, sets = "1B", "B/32", 10, 0.25, ["short captions", "dense captions"]
    elif not GPU:
        sets = ["short captions", "captions"]
    rows = measure_texts(llm, sets, share, rate)
    if GPU:
        torch.cuda.empty_cache()
    rows += measure_training(vision, batch_size, steps, arguments.quick, rate)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
