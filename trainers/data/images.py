"""The image of a row: stored in it, or a file that it names."""

import os
from collections.abc import Mapping
from typing import Any

from PIL import Image

from modeling_proclip.images import BrokenImage, decode_image

from .data_folder import NamedFiles


def decode_stored_image(value: Any, files: NamedFiles | None = None) -> Image.Image:
    """The image that a row holds, in memory and of mode "RGB", as [`~modeling_proclip.images.decode_image`] decodes it everywhere.

    Args:
        value: an image of Pillow, the bytes of a file, the name of one, or `{"bytes": ..., "path": ...}` as `datasets` gives undecoded images.
        files: what the row may name; None: nothing.

    Raises:
        BrokenImage: If there is no image (None, no bytes, no such file), data may not name the file, or it cannot be decoded.
    """
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or (isinstance(value, (bytes, str)) and not value):
        raise BrokenImage("there is no image" if value is None else "it has no bytes")
    if isinstance(value, (bytes, Image.Image)):
        return decode_image(value)
    if not isinstance(value, (str, os.PathLike)) or files is None:
        raise BrokenImage(f"expected an image, found {type(value).__name__} {value!r:.80}")
    try:
        found = files.find(os.fspath(value))
    except (OSError, ValueError) as error:
        raise BrokenImage(str(error)) from error
    return decode_image(found)


# The names that these had before; scripts outside of this package use them.
BrokenPicture, decode_picture = BrokenImage, decode_stored_image
