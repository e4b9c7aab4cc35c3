"""A Trainer that trains on streams of pictures with captions too: each process its own rows, resumed to the same batches."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback

from trainers.data.pair_stream import PairStream
from trainers.data.stream_loader import StreamLoader


logger = logging.getLogger(__name__)


class StreamedTrainer(Trainer):
    """
    Trainer whose `train_dataset` may be a [`PairStream`]; others are as ever. With a stream `max_steps` says how long to train, and
    `per_device_train_batch_size`, `dataloader_num_workers`, `dataloader_pin_memory` and `dataloader_prefetch_factor` are as ever.

    accelerate, which would read all rows in one process and send them to the others, or let every process read all rows and drop most, has no part
    in it: each process opens its share. What every process has read is kept in its checkpoint, so that resuming reads nothing twice.

    Raises:
        ValueError: If an evaluation dataset is a stream, or, on resuming, if the stream or its readers have changed.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if any(isinstance(dataset, IterableDataset) for dataset in evaluated):
            raise ValueError(
                "eval_dataset is a stream: evaluation reads rows by number, so open it with streaming=False"
            )
        self._stream_loader: StreamLoader | None = None
        self._stream_state: Path | None = None  # to go on from
        if isinstance(self.train_dataset, PairStream):
            self.add_callback(_StreamProgress(self))

    def get_train_dataloader(self) -> DataLoader | StreamLoader:
        """As Trainer, or the batches of this process's share of a stream."""
        if not isinstance(self.train_dataset, PairStream):
            return super().get_train_dataloader()
        args = self.args
        stream = self.train_dataset.for_process(args.process_index, args.world_size)
        options: dict[str, Any] = {"pin_memory": args.dataloader_pin_memory}
        if args.dataloader_num_workers:
            options["prefetch_factor"] = args.dataloader_prefetch_factor
            options["multiprocessing_context"] = args.dataloader_multiprocessing_context
        self._stream_loader = StreamLoader(
            stream, self._train_batch_size, self.data_collator, args.dataloader_num_workers, **options
        )
        if self._stream_state is not None:
            self._stream_loader.load_state_dict(json.loads(self._stream_state.read_text()))
        return self._stream_loader

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """
        As [`~transformers.Trainer.train`], from the folder of a checkpoint.

        Raises:
            FileNotFoundError: If the checkpoint does not tell how far this process had read the stream.
        """
        if not resume_from_checkpoint or not isinstance(self.train_dataset, PairStream):
            return super().train(resume_from_checkpoint, **kwargs)
        self._stream_state = Path(str(resume_from_checkpoint)) / self._stream_file()
        if not self._stream_state.exists():
            raise FileNotFoundError(
                f"{self._stream_state} is missing: the checkpoint is of a run on rows by number, or on fewer processes"
            )
        # Trainer would read and throw away all batches that were trained on; the loader knows where to go on.
        ignore_data_skip, self.args.ignore_data_skip = self.args.ignore_data_skip, True
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            self.args.ignore_data_skip, self._stream_state = ignore_data_skip, None

    def _stream_file(self) -> str:
        return f"stream_{self.args.process_index}.json"

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._stream_loader is not None:
            os.makedirs(output_dir, exist_ok=True)
            Path(output_dir, self._stream_file()).write_text(json.dumps(self._stream_loader.state_dict()))


class _StreamProgress(TrainerCallback):
    """Tells how far a run on a stream is, and at its end which rows were passed over."""

    def __init__(self, trainer: StreamedTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        # Trainer takes all steps of a stream for one epoch, but after resuming it counts from the first one.
        state.epoch = state.global_step / state.max_steps

    def on_train_end(self, args, state, control, **kwargs):
        loader = self.trainer._stream_loader
        if loader is not None and loader.skipped().skipped:
            skipped = loader.skipped()
            logger.warning(
                "process %d passed over %s, such as %s", args.process_index, skipped, "; ".join(skipped.examples)
            )
