"""Verifies a text store from its first byte to its last."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from trainers.display.progress import track
from trainers.storage.embedding_shard import EmbeddingShard
from trainers.storage.mapped_safetensors import DamagedFileError
from trainers.storage.object_stores import is_address

from .build import stored_as
from .encoding import encode_texts, encoder_fingerprint, shorten
from .fingerprint import check_same_encoder
from .index import StaleIndexError, map_index, open_index, shards_digest
from .keys import find_keys, text_keys
from .layout import INDEX_REMEDY, SHARD_REMEDY, open_shard, read_settings, shard_paths
from .remote import fetch_store
from .store import TextEmbeddingStore


# Cosine below which an embedding that was computed again is another one: of half precision and other batches it is 0.999 at least.
_SAME = 0.99


@dataclass
class Verification:
    """What [`verify_store`] found.

    Attributes:
        num_shards, num_texts: that were read, damaged ones left out.
        num_compared, smallest_cosine: texts that were embedded again, and the smallest cosine of these embeddings and the stored ones.
        problems: one line each, with the remedy; none if the store is sound.
    """

    num_shards: int = 0
    num_texts: int = 0
    num_compared: int = 0
    smallest_cosine: float | None = None
    problems: list[str] = field(default_factory=list)


def verify_store(
    path: str | Path,
    texts: Iterable[str] | None = None,
    model: torch.nn.Module | None = None,
    processor: Any = None,
    *,
    num_compared: int = 64,
    progress: bool = True,
) -> Verification:
    """Reads all of the store at `path` and checks that embeddings and keys are those that were written, that every number is finite, that no text
    is there twice, and that the index has the place of each key. It changes nothing, except that a missing index is made.

    With `texts`, `model` and `processor`, `num_compared` of the first 100,000 texts are embedded again and compared, as the store holds only their
    hashes. A store in an object store is downloaded into the cache, and the copy is read. FileNotFoundError if there is no store, ValueError if its
    settings cannot be read, or it was made by another encoder than `model`.
    """
    if is_address(path):
        with fetch_store(str(path)) as cached:
            found = verify_store(cached.folder, texts, model, processor, num_compared=num_compared, progress=progress)
        copied = f"this is the cached copy of {path}: where a new copy has the same problem, mend the store there"
        found.problems = [f"{problem} ({copied})" for problem in found.problems]
        return found
    path, found = Path(path).absolute(), Verification()
    settings = read_settings(path)
    if settings is None:
        raise FileNotFoundError(f"{path} is not a text store: it has no store.json")
    sound: list[EmbeddingShard] = []
    for file in track(shard_paths(path), "verifying the store", "shards", shown=progress):
        try:
            shard = open_shard(file, settings["dim"], settings["dtype"], settings["fingerprint"])
            problem = _problem_of_shard(shard)
        except ValueError as error:
            found.problems.append(str(error))
            continue
        if problem:
            found.problems.append(problem)
        else:
            sound.append(shard)
    found.num_shards, found.num_texts = len(sound), sum(shard.num_rows for shard in sound)
    if not found.problems:
        found.problems += _problems_of_index(path, sound)
    if not found.problems and texts is not None and model is not None:
        _compare(path, found, texts, model, processor, num_compared, settings)
    return found


def _problem_of_shard(shard: EmbeddingShard) -> str | None:
    problem = shard.problem()
    if problem is not None:
        return str(shard.damaged(problem))
    not_finite = sum(int((~torch.isfinite(block)).any(dim=1).sum()) for block in shard.blocks())
    return f"{shard.path} holds {not_finite} embeddings that are not finite. {SHARD_REMEDY}" if not_finite else None


def _problems_of_index(path: Path, shards: list[EmbeddingShard]) -> list[str]:
    """The index is sorted, has no key twice and knows the place of each key of each shard."""
    file = path / "index.safetensors"
    try:
        index = map_index(path, shards_digest(shards))
        index.check()
    except (FileNotFoundError, StaleIndexError):  # shards were added since: that is how stores grow, and no damage
        index = open_index(path, shards)
    except DamagedFileError as error:
        return [str(error)]
    first, second = index.keys
    for begin in range(0, max(first.size - 1, 0), 1 << 20):
        a, b = first[begin : begin + (1 << 20) + 1], second[begin : begin + (1 << 20) + 1]
        equal = a[1:] == a[:-1]
        twice = int((equal & (b[1:] == b[:-1])).sum())
        if twice:
            return [
                f"{twice:,} texts or more are in {path} twice: build it anew, with the same number of processes everywhere"
            ]
        if (a[1:] < a[:-1]).any() or (equal & (b[1:] < b[:-1])).any():
            return [f"{file} is not sorted. {INDEX_REMEDY}"]
    start = 0
    for shard in shards:
        keys = shard.read("keys").numpy()
        positions = find_keys(index.keys, keys)
        if (positions < 0).any() or (index.rows[positions] != np.arange(start, start + len(keys))).any():
            return [f"{file} does not know where the texts of {shard.path.name} are. {INDEX_REMEDY}"]
        start += len(keys)
    return []


def _compare(
    path: Path,
    found: Verification,
    texts: Iterable[str],
    model: torch.nn.Module,
    processor: Any,
    num_compared: int,
    settings: dict[str, Any],
) -> None:
    """Embeds a sample of `texts` again."""
    check_same_encoder(path, settings, settings["dtype"], encoder_fingerprint(model, processor))
    store = TextEmbeddingStore(path)
    some = list(islice(texts, 100_000))
    some = some[:: max(len(some) // num_compared, 1)][:num_compared]
    rows = store.find(text_keys(some))
    missing = [text for text, row in zip(some, rows, strict=True) if row < 0]
    if missing:
        found.problems.append(store.missing_message(missing))
    some = [text for text, row in zip(some, rows, strict=True) if row >= 0]
    stored = store.lookup(some).float()
    smallest = 1.0
    for batch in encode_texts(some, model, processor):
        names = [some[i] for i in batch.indices]
        again = stored_as(store.dtype, batch.embeddings, names).float()
        cosines = F.cosine_similarity(again, stored[batch.indices], dim=1)
        length = (again.norm(dim=1) / stored[batch.indices].norm(dim=1)).log().abs()
        for name, cosine, ratio in zip(names, cosines.tolist(), length.tolist(), strict=True):
            if not (cosine >= _SAME and ratio <= 1 - _SAME) and len(found.problems) < 10:
                found.problems.append(
                    f"the embedding of {shorten(name)} is not what the model gives now (cosine {cosine:.4f}): build the store anew"
                )
        smallest = min(smallest, cosines.min().item())
    found.num_compared, found.smallest_cosine = len(some), smallest if some else None
