"""Keys of 128 bits and how they are found."""

import hashlib
from collections.abc import Sequence

import numpy as np


def text_keys(texts: Sequence[str]) -> np.ndarray:
    """The 128-bit BLAKE2b hashes of `texts` in UTF-8, as two 64-bit integers each: `(num_texts, 2)` int64. Among 100 million texts two share a key with a
    chance of about 1e-23. TypeError and ValueError give the position of what is no string, or no valid Unicode (a lone surrogate).
    """
    digests = bytearray()
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text number {position} is not a string but {type(text).__name__}: {text!r}")
        try:
            digests += hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        except UnicodeEncodeError as error:
            raise ValueError(f"text number {position} is not valid Unicode ({error}): {text!r}") from error
    return np.frombuffer(bytes(digests), dtype="<i8").reshape(-1, 2)


def sort_order(keys: np.ndarray) -> np.ndarray:
    """Indices `(num_keys,)` that sort `keys (num_keys, 2)` by their first and then by their second half."""
    return np.lexsort((keys[:, 1], keys[:, 0]))


def find_keys(sorted_keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Positions `(num_wanted,)` int64 of `wanted (num_wanted, 2)` in `sorted_keys`, -1 for those that are not there. `sorted_keys (2, num_keys)` has both
    halves of every key, each half contiguous, in the order of [`sort_order`].
    """
    first, second = sorted_keys
    positions = np.searchsorted(first, wanted[:, 0])
    found = np.full(len(wanted), -1, dtype=np.int64)
    # The binary search reads the first halves only. Where several keys share one, step on until the second half agrees too.
    searching = np.arange(len(wanted))
    while searching.size:
        searching = searching[positions[searching] < first.size]
        searching = searching[first[positions[searching]] == wanted[searching, 0]]
        agrees = second[positions[searching]] == wanted[searching, 1]
        found[searching[agrees]] = positions[searching[agrees]]
        searching = searching[~agrees]
        positions[searching] += 1
    return found
