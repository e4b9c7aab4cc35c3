"""Decodes pictures as they lie on disks: upright, 8-bit RGB, and refused with a reason where they cannot be trusted."""

import io
import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


# A picture of more pixels is refused before it is decoded: a few kilobytes of PNG can hold gigabytes of them. This is Pillow's own limit.
MAX_PIXELS = 89_478_485


class BrokenPicture(ValueError):
    """A picture that cannot be decoded; says why."""


def decode_picture(value: Any, folder: str | None = None) -> Image.Image:
    """
    The picture `value` as the image processors of Transformers see it, but upright and in 8 bits.

    Transparency is laid on white and other colour models become RGB, both as `convert_to_rgb` of Transformers does. Beyond that, a picture is
    turned as its EXIF data say, as `load_image` of Transformers does, and 16 bits a channel are scaled to 8, where Pillow would cut all
    but the darkest 1/256 to white.

    Args:
        value: a picture of Pillow, the bytes of a file, a path, or `{"bytes": ..., "path": ...}` as `datasets` gives undecoded pictures.
        folder: where relative paths begin.

    Returns:
        A fully read picture of mode "RGB".

    Raises:
        BrokenPicture: If there is no picture (None, no bytes, no such file), it is cut short or damaged, of an unknown kind or colour model,
            or has more than 89 million pixels.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or (isinstance(value, (bytes, str)) and not value):
        raise BrokenPicture("there is no picture" if value is None else "it has no bytes")
    try:
        if isinstance(value, Image.Image):
            return _as_rgb(value)
        opened = io.BytesIO(value) if isinstance(value, bytes) else _open(value, folder)
        with opened, Image.open(opened) as picture:
            return _as_rgb(picture)
    except BrokenPicture:
        raise
    except UnidentifiedImageError as error:
        raise BrokenPicture("it is of no kind that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise BrokenPicture(f"a decompression bomb: {error}") from error
    # Pillow's readers raise all of these for damaged files, and struct.error, IndexError and others for those that nobody tested.
    except Exception as error:
        raise BrokenPicture(f"{type(error).__name__}: {error}".replace("\n", " ")[:200]) from error


def _open(path: Any, folder: str | None) -> Any:
    if not isinstance(path, (str, os.PathLike)):
        raise BrokenPicture(f"a {type(path).__name__} is no picture")
    path = os.fspath(path)
    if "://" in path:
        import fsspec

        return fsspec.open(path, "rb").open()
    return open(os.path.join(folder or "", path), "rb")


def _as_rgb(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise BrokenPicture(f"a decompression bomb: {width} x {height} pixels, more than {MAX_PIXELS:,}")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16") or picture.mode == "I":
        values = np.asarray(picture).astype(np.float32) / 257  # a 16-bit PNG is of mode "I" in some releases of Pillow
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise BrokenPicture("mode F: the range of its values is unknown")
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture).convert("RGB")
    return picture.convert("RGB")
