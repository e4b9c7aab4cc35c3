"""ProCLIP's ablations on the quickstart's data: Table 5 (which loss does what), Table 7 (lambda), and lambda against the batch.

    python examples/ablation.py --seeds 0 1 2 --json docs/ablation_results.json

Task, models and settings are those of `proclip quickstart`; a seed draws pictures, captions, adapter and batches anew. Every finished run is
a file in `--output-dir`: a command that was stopped, even by kill -9, goes on with the run it was at. A seed takes about half an hour of one
core, two thirds of it for the batch sweep.
"""

import argparse
import copy
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, set_seed

from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from trainers import (
    ContrastiveTuningConfig,
    ContrastiveTuningTrainer,
    RepresentationInheritanceConfig,
    RepresentationInheritanceTrainer,
)
from trainers.compute.dtypes import native_dtype
from trainers.compute.precision import unit_length
from trainers.contrastive_tuning.config import PUBLISHED_LAMBDA, batch_invariant_weights
from trainers.data import TextEmbeddingStore
from trainers.losses import info_nce_loss, instance_alignment_loss, structure_alignment_loss
from trainers.openmoji.task import SIZES, ImageDataset, Size, make_task
from trainers.quickstart.evaluate import embed_images, score
from trainers.quickstart.language_model import unpack_language_model
from trainers.quickstart.run import ADAPTER, FRESH_ADAPTER, INHERITANCE, TUNING
from trainers.storage.files import write_file, write_safetensors
from trainers.storage.locks import only_writer


BATCHES = (64, 128, 256, 512, 1024)
LLM2CLIP = {"method": "llm2clip"}
LAMBDAS = (0.5, 1.0, 1.5, 2.5)  # times the published 4e-4: Table 7's 2e-4, 4e-4, 6e-4, 1e-3
COLUMNS = {
    "zero_shot_seen": "seen",
    "zero_shot_unseen": "unseen",
    "i2t_r@1": "I→T",
    "t2i_r@1": "T→I",
    "others": "others",
    "drift": "drift",
}


@dataclass(frozen=True)
class Run:
    """One training run. It starts from the result of the run `start`, or from CLIP's image encoder beside a fresh adapter."""

    name: str
    title: str
    stage: str | None  # "inheritance", "tuning", or None: nothing is trained
    steps: int = 0
    start: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def table_5(size: Size) -> list[Run]:
    """CLIP, LLM2CLIP, and ProCLIP with one loss more in every row (ProCLIP, arXiv 2510.18795, Table 5)."""
    tuning = {"stage": "tuning", "steps": size.tuning_steps, "start": "l_struct"}
    inheritance = {"stage": "inheritance", "steps": size.inheritance_steps}
    return [
        Run("clip", "CLIP", None),
        Run("l_ins", "L_ins", **inheritance, settings={**INHERITANCE, "lambda_struct": 0.0}),
        Run("l_struct", "+ L_struct", **inheritance, settings=INHERITANCE),
        Run("l_info", "+ L_info", **tuning, settings=TUNING | LLM2CLIP),
        Run("proclip", "+ L_reg = ProCLIP", **tuning, settings=TUNING | _weights(1.0)),
        Run("llm2clip", "LLM2CLIP", "tuning", size.baseline_steps, settings=TUNING | FRESH_ADAPTER | LLM2CLIP),
    ]


def table_7(size: Size) -> list[Run]:
    """Other weights of L_reg than the published one, which is the last row of Table 5 (ProCLIP, arXiv 2510.18795, Table 7)."""
    return [
        Run(f"lambda-{factor}", f"λ × {factor}", "tuning", size.tuning_steps, "l_struct", TUNING | _weights(factor))
        for factor in LAMBDAS
        if factor != 1.0
    ]


def batch_sweep(size: Size) -> list[Run]:
    """Stage 2 on as many pairs with other batches: L_reg as means (ours) and as sums (published) with one lambda, and without L_reg."""
    pairs, normal = size.tuning_steps * TUNING["per_device_train_batch_size"], TUNING["per_device_train_batch_size"]
    runs = []
    for batch in batches(size):
        published = {"method": "proclip", "reduction": "sum"}  # its weights are 4e-4 and 4e-4
        kinds = {"none": LLM2CLIP, "mean": _weights(1.0), "sum": published}
        for kind, settings in kinds.items():
            if batch == normal and kind != "sum":
                continue  # l_info and proclip of Table 5
            settings = TUNING | settings | {"per_device_train_batch_size": batch}
            name, steps = f"batch-{batch}-{kind}", round(pairs / batch)
            runs.append(Run(name, f"{batch}, {kind}", "tuning", steps, "l_struct", settings))
    # The smallest and the largest batch say most: they come first, in case the rest is not waited for.
    return sorted(runs, key=lambda run: (64, 1024, 128, 512, 256).index(run.settings["per_device_train_batch_size"]))


def batches(size: Size) -> list[int]:
    """The batches of the sweep that the alignment pictures fill."""
    return [batch for batch in BATCHES if batch <= size.seen * size.alignment_views]


def _weights(factor: float) -> dict[str, Any]:
    lambda_ins, lambda_struct = batch_invariant_weights(factor * PUBLISHED_LAMBDA)
    return {"method": "proclip", "lambda_ins": lambda_ins, "lambda_struct": lambda_struct}


class Seed:
    """Everything that the runs of one seed share: pictures, captions, the untrained pair, the two text stores."""

    def __init__(self, folder: Path, size: Size, seed: int):
        self.folder, self.seed = folder, seed
        self.task = make_task(size, seed)
        assets = str(files("trainers.quickstart") / "assets" / "emoji-clip")
        self.clip = CLIPModel.from_pretrained(assets, dtype=torch.float32, attn_implementation="eager").eval()
        clip_processor = CLIPProcessor.from_pretrained(assets)
        images = clip_processor.image_processor
        self.alignment = ImageDataset(self.task, self.task.alignment, images)
        self.test_pixels = ImageDataset(self.task, self.task.test, images).pixel_values
        self.clip_images = embed_images(self.clip, self.test_pixels)
        unpack_language_model(folder / "llm", native_dtype())
        set_seed(seed)
        self.pair = ProCLIPModel.from_vision_text_pretrained(
            copy.deepcopy(self.clip), folder / "llm", attn_implementation="eager", **ADAPTER
        )
        processor = ProCLIPProcessor(images, AutoTokenizer.from_pretrained(folder / "llm"), max_length=128)
        texts = self.task.all_texts()
        self.text_store = TextEmbeddingStore.build(texts, self.pair, processor, folder / "text-store")
        self.teacher_store = TextEmbeddingStore.build(texts, self.clip, clip_processor, folder / "clip-text-store")
        # From this seed's texts: the store grows with every seed, and its own statistics would depend on which ones came before.
        embeds = self.text_store.lookup(texts).double()
        self.pair.text_adapter.set_input_statistics(embeds.mean(dim=0), embeds.std(dim=0, correction=0))
        self.pair.text_model = None  # what trains and scores reads the LLM's embeddings from the store

    def state_file(self, name: str) -> Path:
        return self.folder / "states" / f"seed-{self.seed}-{name}.safetensors"

    def model(self, start: str | None) -> ProCLIPModel:
        """The untrained pair, or what the run `start` made of it."""
        model = copy.deepcopy(self.pair)
        if start is not None:
            model.load_state_dict(load_file(self.state_file(start)))
        return model

    def execute(self, run: Run, keep: bool) -> dict[str, Any]:
        """Train and score `run`: its row. With `keep` its weights are kept for the runs that start from them."""
        start = time.perf_counter()
        if run.stage is None:
            return {"run": asdict(run), **self._score(self.clip_images, self.teacher_store.lookup)}
        model = self.model(run.start)
        arguments = {
            "output_dir": str(self.folder / "training"),
            "max_steps": run.steps,
            "warmup_steps": run.steps // 20,
            "logging_steps": max(1, run.steps // 5),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": not sys.stderr.isatty(),
            "use_cpu": True,
            "bf16": native_dtype() == torch.bfloat16,
            "seed": self.seed,
            **run.settings,
        }
        if run.stage == "inheritance":
            rows = [{"text": text} for text in self.task.inheritance_texts]
            inheritance = RepresentationInheritanceConfig(**arguments)
            stores = {"text_store": self.text_store, "teacher_store": self.teacher_store}
            trainer = RepresentationInheritanceTrainer(model, inheritance, rows, **stores)
        else:
            tuning = ContrastiveTuningConfig(**arguments)
            trainer = ContrastiveTuningTrainer(model, tuning, self.alignment, text_store=self.text_store)
        trainer.train()
        if keep:
            self.state_file(run.name).parent.mkdir(exist_ok=True)
            write_safetensors(self.state_file(run.name), model.state_dict(), {"format": "pt"})
        row = self._score(embed_images(model, self.test_pixels), functools.partial(self._embed_texts, model))
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return {"run": asdict(run), **row, "last_log": logs[-1], "seconds": round(time.perf_counter() - start, 1)}

    def _score(self, images: torch.Tensor, embed_texts: Callable[[list[str]], torch.Tensor]) -> dict[str, Any]:
        row = score(self.task, images, embed_texts)
        others = [accuracy for language, accuracy in row["zero_shot_by_language"].items() if language != "en"]
        drift = instance_alignment_loss(unit_length(images), unit_length(self.clip_images))
        return {**row, "others": statistics.mean(others), "drift": float(drift)}

    @torch.inference_mode()
    def _embed_texts(self, model: ProCLIPModel, texts: list[str]) -> torch.Tensor:
        return model.eval().get_text_features(llm_embeds=self.text_store.lookup(texts)).pooler_output

    def gradient_shares(self) -> dict[str, Any]:
        """How hard L_reg pulls against L_info, by batch and reduction, at one and the same place: the weights of the run `l_info`, held against
        the image encoder before tuning. The norms of lambda L_reg's and of L_info's gradient in the image encoder, averaged over batches.
        """
        tuned, teacher = self.model("l_info").train(), self.model(None).eval()
        parameters = [*tuned.vision_model.parameters(), *tuned.visual_projection.parameters()]
        order = torch.randperm(len(self.alignment), generator=torch.Generator().manual_seed(self.seed))[: max(BATCHES)]
        means, sums = batch_invariant_weights(), (PUBLISHED_LAMBDA, PUBLISHED_LAMBDA)
        shares: dict[str, dict[int, float]] = {"mean": {}, "sum": {}}
        for batch in batches(self.task.size):
            norms: dict[str, list[float]] = {"info": [], "mean": [], "sum": []}
            for rows in order.split(batch):
                if len(rows) < batch:
                    break
                pixels = self.alignment.pixel_values[rows]
                llm_embeds = self.text_store.lookup([self.alignment.texts[row][0] for row in rows])
                outputs = tuned(pixel_values=pixels, llm_embeds=llm_embeds)
                student, texts = outputs.image_embeds, outputs.text_embeds
                with torch.no_grad():
                    target = unit_length(teacher.get_image_features(pixel_values=pixels).pooler_output)
                losses = {"info": info_nce_loss(student, texts, tuned.logit_scale.exp())}
                for kind, weights in (("mean", means), ("sum", sums)):
                    losses[kind] = weights[0] * instance_alignment_loss(student, target, kind)
                    losses[kind] = losses[kind] + weights[1] * structure_alignment_loss(student, target, kind)
                for kind, loss in losses.items():
                    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                    norms[kind].append(float(torch.stack([g.norm() for g in gradients if g is not None]).norm()))
            for kind in shares:
                shares[kind][batch] = statistics.mean(norms[kind]) / statistics.mean(norms["info"])
        return {"gradient_share": shares}


def read_row(path: Path, settings: dict[str, Any] | None) -> dict[str, Any] | None:
    """A finished row, or None if it is not there or was run with other settings."""
    if not path.is_file():
        return None
    row = json.loads(path.read_text())
    return row if settings is None or row["run"] == json.loads(json.dumps(settings)) else None


def summarise(
    rows: dict[tuple[int, str], dict[str, Any]], names: Sequence[str], titles: Sequence[str]
) -> list[dict[str, Any]]:
    """One entry a run: mean and standard deviation (of the sample, over the seeds that have it) of every column."""
    entries = []
    for name, title in zip(names, titles, strict=True):
        found = {seed: row for (seed, run), row in rows.items() if run == name}
        if found:
            columns = {key: _mean_and_std([row[key] for row in found.values()]) for key in COLUMNS}
            entries.append({"name": name, "title": title, "seeds": sorted(found), **columns})
    return entries


def _mean_and_std(values: list[float]) -> dict[str, float | None]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def print_entries(console: Console, title: str, entries: list[dict[str, Any]]) -> None:
    """The other languages, of which an English LLM knows little, are only in the JSON."""
    columns = [key for key in COLUMNS if key != "others"]
    table = _table(title, [*(COLUMNS[key] for key in columns), "seeds"])
    for entry in entries:
        cells = (_with_spread(entry[key], *((1, 3) if key == "drift" else (100, 1))) for key in columns)
        table.add_row(entry["title"], *cells, str(len(entry["seeds"])))
    console.print(table)


def _table(title: str, headings: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _with_spread(value: dict[str, Any], scale: int, digits: int) -> str:
    spread = "" if value["std"] is None else f"±{scale * value['std']:.{digits}f}"
    return f"{scale * value['mean']:.{digits}f}{spread}"


def print_shares(console: Console, shares: dict[str, dict[str, Any]]) -> None:
    """How hard L_reg pulls, a row a reduction and a column a batch."""
    table = _table("|grad λ L_reg| / |grad L_info| in the image encoder, by batch", next(iter(shares.values())))
    for kind, title in (("mean", "mean (ours)"), ("sum", "sum (published)")):
        table.add_row(title, *(_with_spread(value, 1, digits=3) for value in shares[kind].values()))
    console.print(table)


def collect(folder: Path, size: Size, seeds: list[int]) -> dict[str, Any]:
    """What is finished so far, as `--json` holds it."""
    tables = {"table_5": table_5(size), "table_7": table_7(size), "batch_sweep": batch_sweep(size)}
    rows = {
        (seed, run.name): row
        for runs in tables.values()
        for run in runs
        for seed in seeds
        if (row := read_row(row_file(folder, seed, run.name), asdict(run))) is not None
    }
    shared = {(128, "none"): "l_info", (128, "mean"): "proclip"}  # rows of Table 5
    orders = {
        "table_5": [("clip", "CLIP"), ("llm2clip", "LLM2CLIP")]
        + [(run.name, run.title) for run in tables["table_5"] if run.name not in ("clip", "llm2clip")],
        "table_7": [("proclip" if f == 1 else f"lambda-{f}", f"λ = {f * PUBLISHED_LAMBDA:.0e}") for f in LAMBDAS],
        "batch_sweep": [
            (shared.get((batch, kind), f"batch-{batch}-{kind}"), f"{batch}, {kind}")
            for kind in ("none", "mean", "sum")
            for batch in batches(size)
        ],
    }
    results: dict[str, Any] = {key: summarise(rows, *zip(*order, strict=True)) for key, order in orders.items()}
    found = [row["gradient_share"] for seed in seeds if (row := read_row(row_file(folder, seed, "gradients"), None))]
    if found:
        results["gradient_share"] = {
            kind: {
                batch: {**_mean_and_std([share[kind][batch] for share in found]), "seeds": len(found)}
                for batch in found[0][kind]
            }
            for kind in ("mean", "sum")
        }
    results["runs"] = [{"seed": seed, **row} for (seed, _), row in sorted(rows.items())]
    return results


def row_file(folder: Path, seed: int, name: str) -> Path:
    return folder / "rows" / f"seed-{seed}-{name}.json"


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", choices=list(SIZES), default="full", help="of the quickstart's task")
    parser.add_argument("--skip-sweep", action="store_true", help="leave the batch sweep out")
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of what is finished")
    parser.add_argument("--output-dir", type=Path, default=Path("ablation-output"))
    parser.add_argument("--json", type=Path, help="where the results go, besides the table")
    args = parser.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    console, size, folder = Console(highlight=False), SIZES[args.size], args.output_dir.resolve()
    # All seeds of the tables come before the sweep: a table of one seed has no spread.
    runs = [*table_5(size), *table_7(size), None]
    plan = [(seed, run) for seed in args.seeds for run in runs]
    if not args.skip_sweep:
        plan += [(seed, run) for seed in args.seeds for run in batch_sweep(size)]
    if not args.report:
        refusal = f"error: another run is writing to {folder}: wait for it, or choose another --output-dir"
        with only_writer(folder, refusal, error=SystemExit):
            train(console, folder, size, plan)

    results = collect(folder, size, args.seeds)
    print_entries(console, "Table 5: the losses, on the quickstart's data", results["table_5"])
    print_entries(console, "Table 7: the weight of L_reg", results["table_7"])
    print_entries(console, "Batch sweep: stage 2 on the same number of pairs", results["batch_sweep"])
    if "gradient_share" in results:
        print_shares(console, results["gradient_share"])
    console.print(
        "In percent, mean ± standard deviation over seeds; drift: mean squared distance of the test pictures' embeddings from CLIP's.",
        style="dim",
        soft_wrap=True,
    )
    if args.json is not None:
        command = f"python examples/ablation.py --seeds {' '.join(map(str, args.seeds))} --size {args.size}"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        write_json(args.json, {"command": command, "size": args.size, "versions": versions, **results})


def train(console: Console, folder: Path, size: Size, plan: list[tuple[int, Run | None]]) -> None:
    """Do what of `plan` is not finished yet, in its order; `None` stands for the gradient shares."""
    starts = {run.start for _, run in plan if run is not None} | {"l_info"}
    world: Seed | None = None
    for number, (seed, run) in enumerate(plan, start=1):
        name = "gradients" if run is None else run.name
        file = row_file(folder, seed, name)
        if read_row(file, None if run is None else asdict(run)) is not None:
            continue
        if world is None or world.seed != seed:
            world = Seed(folder, size, seed)
        row = world.gradient_shares() if run is None else world.execute(run, keep=run.name in starts)
        write_json(file, row)
        shown = "" if run is None else f"  unseen {100 * row['zero_shot_unseen']:.1f} %, {row.get('seconds', 0):.0f} s"
        console.print(f"{number}/{len(plan)}  seed {seed}, {name}{shown}")


if __name__ == "__main__":
    main()
