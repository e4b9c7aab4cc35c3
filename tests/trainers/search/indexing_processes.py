"""Indexes a folder in processes of its own, which are killed or stand in each other's way: `python -m tests.trainers.search.indexing_processes
killed|together PHOTOS OUTPUT`. Prints how each ended.

The processes are forked from this one, so that the libraries are imported once. It has not used the database before, whose threads no fork would have.
"""

import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from tests.trainers.tiny_encoders import tiny_proclip
from trainers.evaluation.scoring.encoders import Encoder
from trainers.search import build


def start(index: Path, photos: Path, encoder: Encoder, before_writing: Callable[[], object] = lambda: None) -> int:
    """Starts to index `photos` and returns the process's number. It exits with 1 if it is refused."""
    if process := os.fork():
        return process
    write = build._Update._write

    def write_later(self: build._Update, step: list) -> None:
        before_writing()
        write(self, step)

    code = 2
    try:
        build._Update._write = write_later
        build.index_folder(index, photos, "tiny", encoder, batch_size=2)
        code = 0
    except ValueError as error:
        print(f"refused: {error}", flush=True)
        code = 1
    finally:
        os._exit(code)


def end(process: int) -> int:
    """Waits until `process` ends and returns its exit code, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed(photos: Path, output: Path, encoder: Encoder) -> None:
    """Ten times: kills the process at a random moment of a whole run, then lets another finish."""
    for name in ("first", "whole"):  # the first one reads the libraries' files
        started = time.monotonic()
        print(name, end(start(output / f"{name}.index", photos, encoder)), flush=True)
        seconds = time.monotonic() - started
    for number in range(10):
        process = start(output / f"{number}.index", photos, encoder)
        time.sleep(random.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        print("killed", end(process), flush=True)
        print("repeated", end(start(output / f"{number}.index", photos, encoder)), flush=True)


def together(photos: Path, output: Path, encoder: Encoder) -> None:
    """Starts a second process while the first is writing; the first goes on when the second has ended."""
    is_writing, tell_writing = os.pipe()
    may_go_on, tell_go_on = os.pipe()

    def wait() -> None:
        os.write(tell_writing, b"1")
        os.read(may_go_on, 1)

    index = output / "photos.index"
    first = start(index, photos, encoder, wait)
    os.read(is_writing, 1)
    print("second", end(start(index, photos, encoder)), flush=True)
    os.write(tell_go_on, b"1" * 100)
    print("first", end(first), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the database's, of forks
    torch.set_num_threads(1)
    build.STEP_SIZE = 3
    {"killed": killed, "together": together}[sys.argv[1]](
        Path(sys.argv[2]), Path(sys.argv[3]), Encoder(*tiny_proclip(), name="tiny")
    )
