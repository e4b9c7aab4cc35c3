"""`proclip evaluate`: benchmarks, a model and a baseline, and the numbers of both."""

import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from hub_cards.scrubbing import scrub
from trainers.evaluation.data.manifest import Manifest
from trainers.evaluation.data.sources import open_data
from trainers.evaluation.report.examples import Retrieved
from trainers.evaluation.scoring.embedding import embed_images, embed_texts, embeddings, image_keys
from trainers.evaluation.scoring.encoders import Encoder
from trainers.evaluation.scoring.feature_cache import FeatureCache
from trainers.evaluation.scoring.stored import WHOLE, StoredEmbeddings
from trainers.evaluation.scoring.tasks import Outcome, Task, prepare_task
from trainers.storage.locks import only_writer

from .comparison import score_cka, write_examples
from .results import Results


logger = logging.getLogger(__name__)

SCORING = {
    "embeddings": "brought to unit length; scores are cosine similarities in float64",
    "ties": "scores within 1e-12 of each other tie, and a tie counts against the model",
    "recall": "share of the queries whose right answer is among the first k; of several captions of an image, the best counts",
    "prompt_ensemble": "a class is the mean of its prompts' unit-length embeddings, brought to unit length",
    "mean_per_class": "mean over the classes that have images of the share of a class's images that are right",
}


def evaluate(
    encoders: Sequence[Encoder],
    manifests: Sequence[Manifest],
    output_dir: str | Path,
    *,
    sources: Mapping[str, str] | None = None,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    token_budget: int | None = None,
    seed: int = 0,
    progress: bool = True,
    stored: StoredEmbeddings = WHOLE,
) -> list[dict[str, Any]]:
    """Evaluates a model, perhaps a baseline, and perhaps other models beside them, on benchmarks.

    Under `accelerate launch` every process embeds a part and the first one scores; the numbers are the same. What was embedded stays in
    the cache, so the same call goes on where a stopped one was.

    Args:
        encoders: the model; a second one is the baseline; more are other models that came from the same baseline.
        manifests: the benchmarks.
        output_dir: gets `results.json`, `items/` and `examples.json`; those of the baseline in `baseline/`, of others in `also/NAME/`.
        sources: benchmark's name, of its manifest's file or of one variant, -> local copy of its data.
        data_dir: folder that has a copy under the name of every benchmark whose data is not to come from the Hub.
        cache_dir: of embeddings; by default `features/` in `output_dir`. Several evaluations may share one, one after the other.
        limit: draw only so many rows of every benchmark. The results are marked as partial.
        batch_size: images in a batch.
        token_budget: padded tokens in a batch of texts, see [`trainers.text_store.encoding.encode_texts`].
        seed: seed of the rows that `limit` draws, and of the examples.
        progress: whether to show bars.
        stored: what is kept of the embeddings before they are scored. The cache holds whole ones, so that another size costs no embedding.

    Returns:
        What `results.json` holds, for each of `encoders`.

    Raises:
        ValueError: If data does not fit its manifest, an embedding is not finite, or another evaluation writes there.
        OSError: If data cannot be read.
    """
    if not manifests or not encoders:
        raise ValueError("evaluate needs at least one benchmark, and a model with or without a baseline")
    names = [encoder.name for encoder in encoders]
    if len(encoders) > 2 and len(set(names)) < len(names):
        raise ValueError(f"models that are compared need different names, but these are called {', '.join(names)}")
    if limit is not None and limit < 2:
        raise ValueError(f"limit must be at least 2, got {limit}")
    for encoder in encoders:
        encoder.check_truncate_dim(stored.truncate_dim)
    state = PartialState()
    output_dir = Path(output_dir).resolve()
    cache_dir = Path(cache_dir).resolve() if cache_dir else output_dir / "features"
    progress = progress and state.is_local_main_process
    _check_sources(sources or {}, manifests)
    with ExitStack() as stack:
        if state.is_main_process:
            for folder in dict.fromkeys((output_dir, cache_dir)):
                refusal = f"another evaluation is writing to {folder}: wait for it, or choose another directory"
                stack.enter_context(only_writer(folder, refusal))
        state.wait_for_everyone()
        folders = [output_dir, output_dir / "baseline", *also_folders(output_dir, names[2:])]
        runs = [
            _Run(encoder, folder, cache_dir, state, limit, seed, batch_size, token_budget, progress, stored)
            for encoder, folder in zip(encoders, folders, strict=False)
        ]
        for manifest in manifests:
            local = _local_copy(manifest, sources or {}, data_dir)
            with state.main_process_first():  # one process fetches, the others find it there
                task = prepare_task(manifest, open_data(manifest, local, limit, seed))
            keys = image_keys(task, state, progress)
            baseline = runs[1].encoder if len(runs) > 1 else None
            if task.score is None:  # CKA
                for run in runs:
                    if baseline is None:
                        logger.warning(
                            "%s is left out: CKA compares with a baseline, and there is none", manifest.name
                        )
                    elif run.encoder is not baseline:
                        run.compare(task, keys, baseline)
                continue
            scored = [run.score(task, keys) for run in runs]
            if manifest.kind == "retrieval" and state.is_main_process:
                write_examples(output_dir, task, [some for some in scored if some is not None], seed)
        return [run.finish() for run in runs]


def also_folders(output_dir: Path, names: Sequence[str]) -> list[Path]:
    """Where the results of the models beside model and baseline are: in `also/`, under the last part of the name, or all of it where two share that
    part. ValueError if two names come out the same.
    """
    last = [Path(name).name for name in names]
    folders = [
        part if last.count(part) == 1 and part != ".." else re.sub(r"[^\w.-]+", "--", name).strip("-.") or "model"
        for name, part in zip(names, last, strict=True)
    ]
    if len(set(folders)) < len(folders):
        raise ValueError(f"models that are compared need different names, but these are called {', '.join(names)}")
    return [output_dir / "also" / folder for folder in folders]


class _Run:
    """One model's way through the benchmarks."""

    def __init__(
        self,
        encoder: Encoder,
        folder: Path,
        cache_dir: Path,
        state: PartialState,
        limit: int | None,
        seed: int,
        batch_size: int,
        token_budget: int | None,
        progress: bool,
        stored: StoredEmbeddings,
    ):
        self.encoder, self.state, self.batch_size, self.token_budget = encoder, state, batch_size, token_budget
        self.progress, self.stored = progress, stored
        self.images = FeatureCache(cache_dir, "images", encoder.image_fingerprint(), state.process_index)
        self.texts = FeatureCache(cache_dir, "texts", encoder.text_fingerprint(), state.process_index)
        if state.is_main_process:
            self.images.prepare()
            self.texts.prepare()
        state.wait_for_everyone()
        self.results = Results(
            folder,
            encoder.identity(),
            {**encoder.protocol(), **SCORING, **stored.protocol()},
            seed,
            None if limit is None else {"limit": limit},
        )

    def score(self, task: Task, keys: np.ndarray) -> Retrieved | None:
        """Embeds what is missing; the main process computes the numbers and writes them, and returns of retrieval what examples are made of."""
        started = time.perf_counter()
        for cache in (self.images, self.texts):  # the other model may have written what this one can use
            cache.refresh()
        self.state.wait_for_everyone()  # nobody may write before everybody knows what is missing
        embed_images(task, keys, self.encoder, self.images, self.state, self.batch_size, self.progress)
        text_keys = embed_texts(task, self.encoder, self.texts, self.state, self.token_budget, self.progress)
        self.state.wait_for_everyone()
        self.images.refresh()
        self.texts.refresh()
        retrieved = None
        if self.state.is_main_process:
            shared = task.space == "shared"
            image_embeds = embeddings(self.encoder, self.images, keys, project=False) if len(keys) else None
            text_embeds = embeddings(self.encoder, self.texts, text_keys, project=shared) if task.texts else None
            outcome, image_embeds, text_embeds = self.stored.score(task, image_embeds, text_embeds)
            self._add(task, keys, outcome, started)
            if task.manifest.kind == "retrieval":
                retrieved = Retrieved(self.encoder.name, image_embeds, text_embeds, outcome.items["t2i_rank"])
        self.state.wait_for_everyone()
        return retrieved

    def compare(self, task: Task, keys: np.ndarray, baseline: Encoder) -> None:
        """On the main process, CKA between this model's image encoder and the baseline's."""
        if self.state.is_main_process:
            started = time.perf_counter()
            outcome = score_cka(task, self.encoder, baseline, self.batch_size, self.progress)
            self._add(task, keys, outcome, started)
        self.state.wait_for_everyone()

    def _add(self, task: Task, keys: np.ndarray, outcome: Outcome, started: float) -> None:
        manifest, notes, source = task.manifest, list(outcome.notes), task.manifest.data.source
        repeated = len(keys) - len(np.unique(keys, axis=0))
        if repeated and manifest.kind == "retrieval":
            notes.append(
                f"{repeated} images are byte for byte another one: they tie, a tie counts against the model, and so text-to-image recall@1 "
                "of their captions is 0."
            )
        entry = {
            "name": manifest.name,
            "title": manifest.title,
            "kind": manifest.kind,
            "group": manifest.group,
            "dataset": {
                "source": Path(source).name if manifest.group == "own" else scrub(source),
                "read_from": "local copy" if task.data.folder is not None else "source",
                "config": manifest.data.config,
                "revision": task.data.revision,
                "split": manifest.data.split,
                "num_items": len(task.data.rows) - task.data.num_train,
                "num_items_stated": manifest.data.num_items,
                "fingerprint": fingerprint(task, keys),
                "images_fingerprint": images_fingerprint(keys) if len(keys) else None,
            },
            "protocol": {
                **task.facts,
                "num_texts": len(task.texts),
                "num_truncated": self.encoder.count_truncated(list(dict.fromkeys(task.texts))) if task.texts else 0,
                "num_repeated_images": repeated,
                "text_space": task.space,
                "note": manifest.protocol,
            },
            "metric": manifest.primary_metric,
            "value": outcome.metrics[manifest.primary_metric],
            "metrics": outcome.metrics,
            "notes": notes,
            "seconds": round(time.perf_counter() - started, 2),
            **outcome.details,
        }
        self.results.add(entry, outcome.items)

    def finish(self) -> dict[str, Any]:
        """The results as they are in the file."""
        if self.state.is_main_process:
            self.results.write(complete=True)
        return self.results.as_dict()


def images_fingerprint(keys: np.ndarray) -> str:
    """SHA-256 of the images' keys in order: benchmarks on the same images, such as the languages of one, share it."""
    return hashlib.sha256(np.ascontiguousarray(keys).astype("<i8").tobytes()).hexdigest()


def fingerprint(task: Task, keys: np.ndarray) -> str:
    """SHA-256 of what a benchmark consists of, in order: images' bytes, texts, labels. The same data has the same one anywhere."""
    digest = hashlib.sha256(images_fingerprint(keys).encode())
    digest.update(json.dumps([task.texts, task.identity], ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _local_copy(manifest: Manifest, sources: Mapping[str, str], data_dir: str | Path | None) -> str | None:
    """Where a copy of the data lies: under the benchmark's name, or under that of the file that it is a variant in."""
    for name in _names(manifest):
        if name in sources:
            return str(sources[name])
    if data_dir is not None:
        for name in _names(manifest):
            if (Path(data_dir) / name).exists():
                return str(Path(data_dir) / name)
    return None


def _names(manifest: Manifest) -> list[str]:
    return [manifest.name] if manifest.variant_of is None else [manifest.name, manifest.variant_of]


def _check_sources(sources: Mapping[str, str], manifests: Sequence[Manifest]) -> None:
    known = {name for manifest in manifests for name in _names(manifest)}
    for name in sources:
        if name not in known:
            raise ValueError(
                f"--source names {name!r}, which is not a benchmark of this suite: it has {', '.join(m.name for m in manifests)}"
            )
