"""Time, memory, network and cost of a curriculum, computed from constants: 3M to 2B captions, batches to 32k, on 1, 8 and 64 devices.

    python examples/plan_a_run.py                                     # the tables of docs/how_to/plan_a_run.md
    python examples/plan_a_run.py --internode-gbs 12.5 --price 2.5    # 100 Gbit/s Ethernet, another price
    python examples/plan_a_run.py --check                             # the same model against training on this processor, a minute

Nothing is trained or measured but with --check. `proclip train RECIPE --dry-run` plans one recipe on the devices that you have; this script compares data and devices
that you might get. The models are those of recipes/proclip-vit-l-14-*.yaml: a Llama of 8B shape, a ViT-L/14 at 224, and an adapter of four blocks.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from modeling_proclip import ProCLIPConfig, ProCLIPModel
from trainers import ContrastiveTuningConfig, ContrastiveTuningTrainer
from trainers.losses import GPU_BLOCK_ELEMENTS
from trainers.recipe.memory import STRUCTURE_LOSS, memory_of
from trainers.text_store.build import bytes_of_text


MEASURED, ASSUMED = "docs/benchmarks.md, one H200", "assumption: set yours"
# Option -> default, unit, what it is, source.
CONSTANTS = {
    "matmul-tflops": (765.0, "TFLOP/s", "bfloat16 matmul of 8,192³", MEASURED),
    "text-share": (0.64, "", "share of it that embedding packed captions reaches", MEASURED),
    "train-share": (0.405, "", "share of it that stage 2 reaches", MEASURED),
    "cached-share": (0.385, "", "share of it that stage 2 reaches with gradient caching", MEASURED),
    "float32-tflops": (67.0, "TFLOP/s", "float32, in which the losses compute", "NVIDIA H200 SXM datasheet"),
    "device-gb": (141.0, "GB", "memory of a device", "NVIDIA H200 SXM datasheet"),
    "nvlink-gbs": (
        450.0,
        "GB/s",
        "between 8 devices of a node, each way",
        "NVIDIA H200 SXM datasheet (900 both ways)",
    ),
    "internode-gbs": (50.0, "GB/s", "between nodes, for each device, each way", "400 Gbit/s InfiniBand NDR a device"),
    "read-gbs": (2.0, "GB/s", "that a device's data workers read of the text stores", ASSUMED),
    "image-kb": (60.0, "kB", "an image on the disk", ASSUMED),
    "price": (4.0, "$", "a device for an hour", ASSUMED),
    "tokens": (77.0, "", "tokens of a caption, template included", "docs/benchmarks.md, its set of captions"),
    "epochs": (4.0, "", "of stages 1 and 2", "ProCLIP, arXiv 2510.18795, Table 8"),
    "batch": (4096.0, "", "pairs of a step, in the first table", "ProCLIP, arXiv 2510.18795"),
    "micro-batch": (256.0, "", "images that a device takes at once", MEASURED),
}
CAPTIONS = {"3M": 3e6, "30M": 30e6, "400M": 400e6, "2B": 2e9}
BATCHES, DEVICES = (4096, 8192, 16384, 32768), (1, 8, 64)
LLM_LAYERS, LLM_SIZE, LLM_INNER, LLM_KEYS = 32, 4096, 14336, 1024
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
}
DIM = 768
# CLIP's own text encoder, the teacher of stage 1: 12 layers of width 768, 77 tokens.
TEACHER_FLOPS = 2 * 12 * 12 * 768**2 * 77

# Matrix products of rows x columns x DIM in the losses and their gradients: InfoNCE has two, the structure loss three for the student and three
# for the teacher (in float32, trainers/losses.py). Forward, again in the backward pass, and two for each that has a gradient.
LOSS_PRODUCTS = 2 * (1 + 1 + 2) + 3 * (1 + 1 + 2) + 3 * (1 + 1)
# Sides of the embeddings that are gathered (v and t, v and v*), and whose gradients are summed over the devices (v, t and v), which sends each twice.
GATHERED, SUMMED = 4, 3


@dataclass(frozen=True)
class Model:
    """FLOPs and bytes of the models, from their shapes.

    Attributes:
        image_flops: one forward pass of the image encoder over one image.
        trained: trained parameters of stage 2.
        adapter: parameters of the text adapter.
        weights: bytes of image encoder, adapter and EMA teacher.
        image_bytes: bytes of activations for each image that a device takes at once.
    """

    image_flops: float
    trained: int
    adapter: int
    weights: int
    image_bytes: float


def forward_flops(model: ProCLIPModel) -> float:
    """One forward pass of the image encoder over one image: 2 x weights x tokens, and attention's two products."""
    config = model.config.vision_config
    num_tokens = (config.image_size // config.patch_size) ** 2 + 1
    weights = sum(p.numel() for name, p in model.vision_model.named_parameters() if "embeddings" not in name)
    return 2 * weights * num_tokens + 4 * config.num_hidden_layers * config.hidden_size * num_tokens**2


def text_flops(tokens: float) -> float:
    """One forward pass of the LLM over one caption."""
    matrices = 2 * LLM_SIZE**2 + 2 * LLM_SIZE * LLM_KEYS + 3 * LLM_SIZE * LLM_INNER
    return LLM_LAYERS * (2 * matrices * tokens + 4 * LLM_SIZE * tokens**2)


def describe_model() -> Model:
    """The sizes of the recipe's models; their activations by `proclip train --dry-run`'s plan for 256 images in bfloat16."""
    text = {"model_type": "llama", "hidden_size": LLM_SIZE, "num_hidden_layers": 1, "vocab_size": 8}
    config = ProCLIPConfig(vision_config=VISION, text_config=text, projection_dim=DIM, dtype="float32")
    with torch.device("meta"):
        model = ProCLIPModel(config, load_text_model=False)
    rows = 256
    with tempfile.TemporaryDirectory() as folder:
        arguments = ContrastiveTuningConfig(
            folder, per_device_train_batch_size=rows, use_cpu=True, bf16=True, report_to="none"
        )
        plan = memory_of(model, arguments, torch.bfloat16)
    assert plan is not None
    adapter = sum(p.numel() for p in model.text_adapter.parameters())
    return Model(forward_flops(model), plan.gradients // 4, adapter, plan.weights, plan.activations / rows)


class Plan:
    """What the constants give."""

    def __init__(self, constants: argparse.Namespace, model: Model):
        self.constants, self.model = constants, model
        self.rate = constants.matmul_tflops * 1e12

    def bandwidth(self, devices: int) -> float:
        """Bytes a second that a device receives from the others."""
        return 1e9 * (self.constants.nvlink_gbs if devices <= 8 else self.constants.internode_gbs)

    def is_cached(self, batch: float, devices: int) -> bool:
        """Whether a device's share of the batch needs gradient caching."""
        return batch / devices > self.constants.micro_batch

    def compute_seconds(self, batch: float, devices: int) -> float:
        """A step of stage 2 without the network. A backward pass counts as two forward passes, the EMA teacher's pass and that of gradient caching
        as one each."""
        cached = self.is_cached(batch, devices)
        share, rows = self.constants.cached_share if cached else self.constants.train_share, batch / devices
        flops = rows * ((4 + cached) * self.model.image_flops + (3 + cached) * 2 * self.model.adapter)
        loss = LOSS_PRODUCTS * 2 * rows * batch * DIM
        return flops / (self.rate * share) + loss / (self.constants.float32_tflops * 1e12)

    def gathered_bytes(self, batch: float, devices: int) -> float:
        """Embeddings and their gradients that a device receives in a step."""
        return (GATHERED + 2 * SUMMED) * (devices - 1) / devices * batch * DIM * 4

    def reduced_bytes(self, devices: int) -> float:
        """Gradients that a device receives in a step: an all-reduce in a ring."""
        return 2 * (devices - 1) / devices * self.model.trained * 4

    def network_seconds(self, batch: float, devices: int) -> float:
        """As if nothing were sent while something is computed."""
        return (self.gathered_bytes(batch, devices) + self.reduced_bytes(devices)) / self.bandwidth(devices)

    def memory(self, batch: float, devices: int) -> float:
        """Bytes of a device at its peak, as `trainers.recipe.memory` adds them up."""
        share = batch / devices
        gradients, optimizer = 4 * self.model.trained, 8 * self.model.trained
        activations = min(share, self.constants.micro_batch) * self.model.image_bytes
        side = share * DIM * 4
        of_number, copies = STRUCTURE_LOSS
        loss = of_number * min(GPU_BLOCK_ELEMENTS, share * batch) + copies * side
        loss += 4 * batch * DIM * 4 if devices > 1 else 0
        held = self.model.weights + optimizer + (gradients if devices > 1 else 0)
        if self.is_cached(batch, devices):
            return held + gradients + max(activations + 3 * side, 6 * side + loss)
        return held + max(gradients, activations + loss)

    def embedding_hours(self, captions: float, devices: int) -> float:
        """Both encoders of texts, each caption once."""
        flops = captions * (text_flops(self.constants.tokens) + TEACHER_FLOPS)
        return flops / (self.rate * self.constants.text_share * devices) / 3600

    def row_bytes(self) -> int:
        """A caption in both text stores, float16."""
        return bytes_of_text(LLM_SIZE, "float16") + bytes_of_text(DIM, "float16")

    def stage_1_hours(self, captions: float, devices: int) -> float:
        """The slower of computing the adapter and reading the stores."""
        rows = captions * self.constants.epochs / devices
        computing = rows * 6 * self.model.adapter / (self.rate * self.constants.train_share)
        return max(computing, rows * self.row_bytes() / (self.constants.read_gbs * 1e9)) / 3600

    def stage_2_hours(self, captions: float, devices: int) -> float:
        """Computing and then the network, step by step."""
        steps, batch = captions * self.constants.epochs / self.constants.batch, self.constants.batch
        return steps * (self.compute_seconds(batch, devices) + self.network_seconds(batch, devices)) / 3600

    def read_rate(self, devices: int) -> float:
        """Bytes a second that all devices together read in stage 2."""
        batch = self.constants.batch
        seconds = self.compute_seconds(batch, devices) + self.network_seconds(batch, devices)
        return batch / seconds * (self.constants.image_kb * 1e3 + bytes_of_text(LLM_SIZE, "float16"))


def corpus_rows(plan: Plan) -> Iterable[Sequence[str]]:
    for name, captions in CAPTIONS.items():
        for devices in DEVICES:
            hours = [of(captions, devices) for of in (plan.embedding_hours, plan.stage_1_hours, plan.stage_2_hours)]
            cost = sum(hours) * devices * plan.constants.price
            store = captions * plan.row_bytes() / 1e9
            yield (
                name,
                str(devices),
                f"{store:,.0f}",
                *(f"{h:,.1f}" for h in (*hours, sum(hours))),
                f"{plan.read_rate(devices) / 1e9:.2f}",
                f"{cost:,.0f}",
            )


def step_rows(plan: Plan) -> Iterable[Sequence[str]]:
    for batch in BATCHES:
        for devices in DEVICES:
            computing, network = plan.compute_seconds(batch, devices), plan.network_seconds(batch, devices)
            memory = plan.memory(batch, devices) / 1e9
            yield (
                f"{batch:,}",
                str(devices),
                f"{batch // devices:,}" + ("*" if plan.is_cached(batch, devices) else ""),
                f"{memory:.0f}" + ("" if memory < plan.constants.device_gb else " (too much)"),
                f"{plan.gathered_bytes(batch, devices) / 1e6:,.0f}",
                f"{plan.reduced_bytes(devices) / 1e6:,.0f}",
                f"{computing:.2f}",
                f"{network:.3f}",
                f"{batch / (computing + network):,.0f}",
            )


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(constants: argparse.Namespace) -> str:
    """The tables in markdown."""
    plan = Plan(constants, describe_model())
    given = [
        (f"`--{name}`", f"{getattr(constants, name.replace('-', '_')):,g} {unit}".strip(), what, source)
        for name, (_, unit, what, source) in CONSTANTS.items()
    ]
    model = plan.model
    return "\n\n".join(
        [
            "Computed, not measured.",
            markdown(["constant", "value", "what", "source"], given),
            f"From the shapes of the models: {model.image_flops / 1e9:,.0f} GFLOP for an image forward, {text_flops(constants.tokens) / 1e9:,.0f} GFLOP for a "
            f"caption, {model.trained / 1e6:,.0f} million trained parameters, {model.image_bytes / 1e6:,.0f} MB of activations for an image, "
            f"{plan.row_bytes():,} bytes for a caption in both text stores.",
            f"**The whole curriculum**, batch {constants.batch:,.0f}. Hours of the clock.",
            markdown(
                ["captions", "devices", "stores, GB", "embedding, h", "stage 1, h", "stage 2, h", "in all, h"]
                + ["stage 2 reads, GB/s", "cost, $"],
                corpus_rows(plan),
            ),
            f"**A step of stage 2.** \\* in micro-batches of {constants.micro_batch:,.0f}, by gradient caching.",
            markdown(
                ["batch", "devices", "pairs a device", "memory, GB", "embeddings received, MB"]
                + ["gradients received, MB", "computing, s", "network, s", "pairs a second"],
                step_rows(plan),
            ),
        ]
    )


# Against training on this processor


class Pairs:
    """As many rows as a batch, with pixels that are there already."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        return {"text": str(index), "pixel_values": torch.zeros(3, 112, 112)}

    def lookup(self, texts: list[str]) -> torch.Tensor:
        return torch.ones(len(texts), 64)


def processor_seconds(vision: dict, batch: int, **settings) -> tuple[float, float]:
    """Forward FLOPs of an image, and seconds of the processor for an image in a step."""
    text = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 8}
    torch.manual_seed(0)
    model = ProCLIPModel(
        ProCLIPConfig(vision_config=vision, text_config=text, projection_dim=64), load_text_model=False
    )
    with tempfile.TemporaryDirectory() as folder:
        args = ContrastiveTuningConfig(
            folder, per_device_train_batch_size=batch, use_cpu=True, report_to="none", **settings
        )
        trainer = ContrastiveTuningTrainer(model, args, Pairs(batch), text_store=Pairs(batch))
        trainer.current_gradient_accumulation_steps = 1  # which train() would set
        optimizer = trainer.create_optimizer()
        rows = {"pixel_values": torch.randn(batch, 3, 112, 112), "llm_embeds": torch.randn(batch, 64)}
        times = []
        for _ in range(3):
            started = time.process_time()
            trainer.training_step(model, dict(rows))
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.process_time() - started)
    return forward_flops(model), min(times) / batch


def check() -> str:
    """Times of training on this processor, in one thread, against those that the rate of LLM2CLIP's step predicts by the same FLOPs."""
    torch.set_num_threads(1)
    small = {**VISION, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    small |= {"image_size": 112, "patch_size": 16}
    ways = {
        "LLM2CLIP": (small, 3, {"method": "llm2clip"}),
        "ProCLIP": (small, 4, {}),
        "ProCLIP, cached": (small, 5, {"gradient_caching_batch_size": 32}),
        "ProCLIP, twice the layers": ({**small, "num_hidden_layers": 8}, 4, {}),
        "ProCLIP, twice the width": ({**small, "hidden_size": 512, "intermediate_size": 2048}, 4, {}),
    }
    a, b = torch.randn(2, 2048, 2048)
    times = []
    for _ in range(4):
        started = time.process_time()
        a @ b
        times.append(time.process_time() - started)
    matmul, rate, rows = 2 * 2048**3 / min(times), 0.0, []
    for name, (vision, passes, settings) in ways.items():
        flops, measured = processor_seconds(vision, 128, **settings)
        rate = rate or passes * flops / measured
        predicted = passes * flops / rate
        rows.append((name, f"{1e3 * measured:.2f}", f"{1e3 * predicted:.2f}", f"{predicted / measured - 1:+.0%}"))
    head = f"Matmul of 2,048³ in float32: {matmul / 1e9:,.0f} GFLOP/s; LLM2CLIP's step reaches {rate / matmul:.2f} of it.\n\n"
    return head + markdown(["step", "measured, ms an image", "predicted, ms an image", "off by"], rows)


def positive(text: str) -> float:
    """A number of the command line. ArgumentTypeError if it is not positive and finite."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be more than 0 and finite, got {text}")
    return number


def read_constants(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line, which are the constants and `check`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="train on this processor and compare")
    for name, (default, unit, what, source) in CONSTANTS.items():
        parser.add_argument(
            f"--{name}",
            type=positive,
            default=default,
            help=f"{what} ({unit or 'a number'}; {source}); default %(default)s",
        )
    return parser.parse_args(arguments)


def main() -> None:
    """Prints the tables, or with --check how far off they are here."""
    constants = read_constants()
    print(check() if constants.check else report(constants))


if __name__ == "__main__":
    main()
