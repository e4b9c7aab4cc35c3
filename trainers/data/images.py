"""Decodes images as datasets hold them; the decoder itself is the model's own."""

import os
from typing import Any

from PIL import Image

from modeling_proclip.images import BrokenImage as BrokenPicture
from modeling_proclip.images import decode_image


def decode_picture(value: Any, folder: str | None = None) -> Image.Image:
    """
    The image that a row holds, as [`~modeling_proclip.images.decode_image`] decodes it everywhere.

    Args:
        value: an image of Pillow, the bytes of a file, a path, or `{"bytes": ..., "path": ...}` as `datasets` gives undecoded images.
        folder: where relative paths begin.

    Returns:
        An image in memory, of mode "RGB".

    Raises:
        BrokenPicture: If there is no image (None, no bytes, no such file, an address), or it cannot be decoded.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or (isinstance(value, (bytes, str)) and not value):
        raise BrokenPicture("there is no image" if value is None else "it has no bytes")
    if isinstance(value, (bytes, Image.Image)):
        return decode_image(value)
    if not isinstance(value, (str, os.PathLike)):
        raise BrokenPicture(f"expected an image, found {type(value).__name__}")
    if "://" in os.fspath(value):  # what is at an address is the business of whoever wrote the row, who might name any
        raise BrokenPicture(f"{os.fspath(value)!r:.80} is an address, and images are read from files only")
    return decode_image(os.path.join(folder or "", value))


__all__ = ["BrokenPicture", "decode_picture"]
