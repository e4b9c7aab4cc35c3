"""Training and evaluation on streams of images with captions: each process reads its own rows, and a resumed run reads none of them twice."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainingArguments

from trainers.data.pair_stream import PairStream
from trainers.data.stream_evaluation import EvaluationBatches
from trainers.data.stream_loader import StreamLoader


logger = logging.getLogger(__name__)


class StreamReader(TrainerCallback):
    """Reads this process's share of a [`PairStream`], and keeps in each checkpoint how far it has come.

    accelerate, which would read all rows in one process and send them to the others, or let every process read all rows and drop most, has
    no part in it. As a callback it reports the share of the steps that is done as the epoch, and at the end the rows that were passed over. ValueError
    if `args` ask for another order.
    """

    def __init__(self, stream: PairStream, args: TrainingArguments):
        if args.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy={args.train_sampling_strategy!r}: a stream has its own order, see PairSource; leave it 'random'."
            )
        self.stream, self.args = stream, args
        self._loader: StreamLoader | None = None

    def open(self, collate: Any, checkpoint: str | None) -> StreamLoader:
        """The batches, from the beginning or from where the `checkpoint` was written. FileNotFoundError if the checkpoint does not say how far this process
        had read the stream, ValueError if the stream or its readers have changed since.
        """
        args = self.args
        stream = self.stream.for_process(args.process_index, args.world_size)
        loader = StreamLoader(
            stream, args.train_batch_size, collate, args.dataloader_num_workers, **_loading_options(args)
        )
        if checkpoint is not None:
            loader.load_state_dict(self._read_state(checkpoint))
        self._loader = loader
        return loader

    def save(self, folder: str | Path) -> None:
        """Write into a checkpoint how far this process has read."""
        if self._loader is not None:
            self._file(folder).write_text(json.dumps(self._loader.state_dict()))

    def _read_state(self, checkpoint: str) -> Any:
        """How far this process had read. If the checkpoint is of fewer processes, how far the first one had, which names their number."""
        for file in (self._file(checkpoint), Path(checkpoint, "stream_0.json")):
            if file.exists():
                return json.loads(file.read_text())
        raise FileNotFoundError(f"{file} is missing: the checkpoint is of a run on rows by number")

    def _file(self, folder: str | Path) -> Path:
        return Path(folder, f"stream_{self.args.process_index}.json")

    def on_step_end(self, args, state, control, **kwargs):
        # Trainer takes all steps of a stream for one epoch, but after resuming it counts from the first one.
        state.epoch = state.global_step / state.max_steps

    def on_train_end(self, args, state, control, **kwargs):
        skipped = self._loader.skipped() if self._loader is not None else None
        if skipped is not None and skipped.skipped:
            logger.warning(
                "process %d passed over %s, such as %s", args.process_index, skipped, "; ".join(skipped.examples)
            )


def evaluation_loader(stream: PairStream, args: TrainingArguments, collate: Any) -> DataLoaderShard:
    """The batches of this process for an evaluation on `stream`, on the host: see [`EvaluationBatches`]. By accelerate's loader, which tells the loops
    of Trainer that they are in an evaluation, within a training too.
    """
    stream = stream.for_process(args.process_index, args.world_size)
    batches = EvaluationBatches(stream, args.eval_batch_size, collate)
    # A generator of its own: else starting the loader would move the random state of a training.
    generator = torch.Generator().manual_seed(args.seed)
    return DataLoaderShard(
        batches,
        batch_size=None,
        num_workers=args.dataloader_num_workers,
        collate_fn=_as_it_is,
        generator=generator,
        **_loading_options(args),
    )


def _loading_options(args: TrainingArguments) -> dict[str, Any]:
    """Keyword arguments of a DataLoader; those of data workers are refused where there are none."""
    options: dict[str, Any] = {"pin_memory": args.dataloader_pin_memory}
    if args.dataloader_num_workers:
        options["prefetch_factor"] = args.dataloader_prefetch_factor
        options["multiprocessing_context"] = args.dataloader_multiprocessing_context
    return options


def _as_it_is(batch: Any) -> Any:
    return batch


def check_evaluated_streams(eval_dataset: Any, *, are_read: bool) -> None:
    """Raises ValueError if one of the datasets to evaluate is a stream, or with `are_read` one that is no [`PairStream`]."""
    evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    for dataset in evaluated:
        if isinstance(dataset, IterableDataset) and not (are_read and isinstance(dataset, PairStream)):
            wanted = "one is read from a PairSource" if are_read else "this stage evaluates on rows by number"
            raise ValueError(f"eval_dataset is a stream, and {wanted}: open it with streaming={are_read}")
