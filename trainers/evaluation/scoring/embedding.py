"""Embeds the images and texts of a task through the cache, on every process a part."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from modeling_proclip.images import BrokenImage, decode_image
from trainers.compute.ahead import one_ahead
from trainers.display.progress import Progress
from trainers.text_store.encoding import shorten
from trainers.text_store.keys import text_keys

from .encoders import Encoder
from .feature_cache import FeatureCache, ShardWriter, content_keys
from .tasks import Task


# Texts that are tokenised and sorted by length together.
_TEXT_WINDOW = 8192
# Batches of images that are decoded ahead, each in a thread: at 224 pixels, 64 of them take 39 MB.
_LOOKAHEAD = min(4, os.cpu_count() or 1)
# Images whose files are hashed together.
_HASHED = 64


def image_keys(task: Task, state: PartialState, progress: bool) -> np.ndarray:
    """The keys of all images of `task`, column after column: `(num_columns * num_rows, 2)`, on every process. Each process reads a part of the files."""
    places = list(_image_places(task))
    mine = range(len(places))[state.process_index :: state.num_processes]
    keys = np.empty((len(mine), 2), np.int64)
    with Progress(f"{task.manifest.name}: reading images", len(mine), "images", shown=progress) as bar:
        for start in range(0, len(mine), _HASHED):
            some = mine[start : start + _HASHED]
            keys[start : start + len(some)] = content_keys([image_bytes(task, *places[i]) for i in some])
            bar.advance(len(some))
    parts = gather_object([keys.tobytes()]) if state.num_processes > 1 else [keys.tobytes()]
    whole = np.empty((len(places), 2), np.int64)
    for rank, part in enumerate(parts):
        whole[rank :: state.num_processes] = np.frombuffer(part, np.int64).reshape(-1, 2)
    return whole


def embed_images(
    task: Task,
    keys: np.ndarray,
    encoder: Encoder,
    cache: FeatureCache,
    state: PartialState,
    batch_size: int,
    progress: bool,
) -> None:
    """Puts into `cache` the images of `task` that it lacks. `keys` are those of [`image_keys`]."""
    places = list(_image_places(task))
    mine = cache.missing(keys)[state.process_index :: state.num_processes].tolist()
    bar = Progress(f"{task.manifest.name}: embedding images", len(mine), "images", shown=progress)
    writing = ShardWriter(cache, keys, lambda i: _image_name(task, *places[i]))
    with bar, writing as writer, ThreadPoolExecutor(_LOOKAHEAD) as pool:

        def prepare(batch: list[int]) -> tuple[list[int], Any]:
            return batch, encoder.prepare_images(decode(task, *places[i]) for i in batch)

        # The next batches are decoded while the model works on one.
        batches = (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))
        waiting: deque[Future] = deque(pool.submit(prepare, batch) for _, batch in zip(range(_LOOKAHEAD), batches))
        while waiting:
            batch, inputs = waiting.popleft().result()
            following = next(batches, None)
            if following is not None:
                waiting.append(pool.submit(prepare, following))
            writer.add(batch, encoder.encode_images(inputs))
            bar.advance(len(batch))


def embed_texts(
    task: Task, encoder: Encoder, cache: FeatureCache, state: PartialState, token_budget: int | None, progress: bool
) -> np.ndarray:
    """Puts into `cache` the texts of `task` that it lacks, equal ones once. Returns the keys of all texts, `(num_texts, 2)`."""
    keys = text_keys(task.texts)
    mine = cache.missing(keys)[state.process_index :: state.num_processes].tolist()
    bar = Progress(f"{task.manifest.name}: embedding texts", len(mine), "texts", shown=progress)
    with bar, ShardWriter(cache, keys, lambda i: f"the text {shorten(task.texts[i])}") as writer:
        windows = (mine[start : start + _TEXT_WINDOW] for start in range(0, len(mine), _TEXT_WINDOW))
        calls = ((window, encoder.encode_texts([task.texts[i] for i in window], token_budget)) for window in windows)
        for window, batches in one_ahead(calls):
            for batch in batches:
                writer.add([window[i] for i in batch.indices], batch.embeddings)
                bar.advance(len(batch.indices))
    return keys


def image_bytes(task: Task, column: str, row: int) -> bytes:
    """The file of an image as it was stored. ValueError if there is none; names benchmark, row and file."""
    value, name = _stored(task, column, row), _image_name(task, column, row)
    if isinstance(value, dict) and value.get("bytes") is not None:
        return value["bytes"]
    path = value.get("path") if isinstance(value, dict) else value
    if isinstance(path, str) and task.data.files is not None:
        try:
            found = task.data.files.find(path)
        except (OSError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        return found if isinstance(found, bytes) else found.read_bytes()
    raise ValueError(f"{name}: expected an image, found {type(value).__name__} {value!r:.60}")


def decode(task: Task, column: str, row: int) -> Image.Image:
    """The image, decoded. ValueError if it cannot be; names benchmark, row and file."""
    try:
        return decode_image(image_bytes(task, column, row))
    except BrokenImage as error:
        raise ValueError(
            f"{_image_name(task, column, row)} cannot be read ({error}). Without it the number would be another one: mend the image"
        ) from error


def _stored(task: Task, column: str, row: int) -> Any:
    """The undecoded image of a row, which may stand in a list of one."""
    value = task.data.rows[row][column]
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _image_places(task: Task) -> Iterator[tuple[str, int]]:
    return ((column, row) for column in task.image_columns for row in range(len(task.data.rows)))


def _image_name(task: Task, column: str, row: int) -> str:
    value = _stored(task, column, row)
    path = value.get("path") if isinstance(value, dict) else value
    file = f" ({path})" if isinstance(path, str) else ""
    return f"{task.data.row_name(row)}: the image in column {column!r}{file}"


def embeddings(encoder: Encoder, cache: FeatureCache, keys: np.ndarray, project: bool) -> torch.Tensor:
    """The embeddings of `keys` `(N, p)` float32 from the cache, those of texts brought into the shared space if `project`."""
    blocks = cache.blocks(keys)
    return torch.cat([encoder.project_texts(block) if project else block for block in blocks])
