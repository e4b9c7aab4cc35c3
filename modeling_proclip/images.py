"""The one decoder of images: upright 8-bit RGB, on white where transparent, refused with a reason where the pixels cannot be trusted."""

import io
import os

import numpy as np
from PIL import Image


# Refused before any pixel is decoded: a few kilobytes of PNG can hold gigabytes. The limit is Pillow's own.
MAX_PIXELS = 89_478_485
# The shortest side is resized to 224 pixels or more, so a strip of 30,000 x 1 would become 6,720,000 x 224. Qwen2-VL has the same limit.
MAX_ASPECT_RATIO = 200

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImage(ValueError):
    """An image that cannot be decoded. The message says why; whoever knows the image's name adds it."""


def decode_image(source: Image.Image | bytes | str | os.PathLike) -> Image.Image:
    """The image as a viewer shows it. Decoding a decoded image changes nothing.

    The camera's rotation is undone, and ignored where the EXIF data cannot be read. Transparent pixels become white. 16 bits a channel are
    scaled to 8, where Pillow would turn all but the darkest 1/256 white. CMYK and palettes become RGB as Pillow converts them. Of an
    animation the current frame is taken, which is the first one of a file.

    Args:
        source (`PIL.Image.Image`, `bytes`, `str` or `os.PathLike`): An image, the contents of a file, or the path of one.

    Returns:
        `PIL.Image.Image` of mode "RGB", in memory, without metadata.

    Raises:
        BrokenImage: If it is missing, damaged, of an unknown format or a program (EPS), holds floats or values beyond 16 bits, has no
            pixels, more than 89 million, or one side more than 200 times as long as the other.
    """
    try:
        if isinstance(source, Image.Image):
            return _as_rgb(source)
        if not isinstance(source, bytes) and not os.path.isfile(
            source
        ):  # nor is a pipe one, which could be waited for forever
            raise BrokenImage(f"there is no file {os.fspath(source)}")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _as_rgb(image)
    except BrokenImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise BrokenImage("not an image of a format that Pillow reads") from error
    # For a damaged file Pillow's readers raise OSError, SyntaxError, ValueError, struct.error, IndexError, MemoryError and others.
    except Exception as error:
        kind = "a decompression bomb" if isinstance(error, Image.DecompressionBombError) else type(error).__name__
        raise BrokenImage(f"{kind}: {error}".replace("\n", " ")[:200]) from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.format == "EPS":
        raise BrokenImage("an EPS file is a program, which is not run: save the image as PNG or JPEG")
    _check_size(*image.size)
    image.load()
    method = _UPRIGHT.get(_orientation(image))
    if image.mode == "F":
        raise BrokenImage(
            "its pixels are floats (mode F), of which nobody knows which is white: save it with 8 or 16 bits a channel"
        )
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if method is not None:
        image = image.transpose(method)
    image.info = {}  # else the next reader would rotate it again
    return image


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise BrokenImage(f"it has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise BrokenImage(
            f"a decompression bomb, or too large: {width} x {height} pixels, more than {MAX_PIXELS:,}; scale it down"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise BrokenImage(
            f"a strip of {width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times as long as the other; crop it"
        )


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF data raise anything, and the pixels are sound all the same
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits as 8. Pillow's mode for them is "I;16", or "I" with 32 bits in some releases and for some formats."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BrokenImage(
            f"its values go from {values.min()} to {values.max()}, and only 8 or 16 bits a channel have a known white: save it so"
        )
    if isinstance(transparent := image.info.get("transparency"), int):
        values = np.where(values == transparent, 65535, values)
    return Image.fromarray((values / 257).round().astype(np.uint8))
