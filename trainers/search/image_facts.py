"""What an index keeps of an image beside its embedding: content hash, size, date, caption, thumbnail."""

import hashlib
import io
import logging
from datetime import datetime
from pathlib import Path

from PIL import Image

from trainers.data.text_lines import read_lines


logger = logging.getLogger(__name__)

THUMBNAIL_SIDE = 256  # pixels of the longer side
# A caption beside an image is a sentence or a page; what is larger is another kind of file.
MAX_CAPTION_BYTES = 65_536
_EXIF_IFD, _DATE_TIME_ORIGINAL, _DATE_TIME = 0x8769, 0x9003, 0x0132  # of the EXIF standard


def checksum(data: bytes) -> str:
    """128 bits of BLAKE2b in hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def date_taken(data: bytes) -> str | None:
    """When the image in the file `data` was taken by its EXIF data, as `2025-01-31T12:00:00`, or `None` if they do not say."""
    try:
        exif = Image.open(io.BytesIO(data)).getexif()
        value = exif.get_ifd(_EXIF_IFD).get(_DATE_TIME_ORIGINAL) or exif.get(_DATE_TIME)
        return datetime.strptime(str(value).strip("\x00 "), "%Y:%m:%d %H:%M:%S").isoformat()
    except (
        Exception
    ):  # a camera's broken tag, of which Pillow's readers raise anything, costs the date and not the image
        return None


def thumbnail(image: Image.Image) -> bytes:
    """A JPEG file of the RGB `image`, its longer side at most [`THUMBNAIL_SIDE`] pixels."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return file.getvalue()


def caption_of(image: Path) -> str | None:
    """The caption in the `.txt` file beside `image`, or `None` if there is none. A warning names one that cannot be read: not UTF-8, or larger than
    64 KiB.
    """
    file = next((file for ending in (".txt", ".TXT") if (file := image.with_suffix(ending)).is_file()), None)
    if file is None or file.is_symlink():
        return None
    try:
        if (size := file.stat().st_size) > MAX_CAPTION_BYTES:
            raise ValueError(f"{file} has {size:,} bytes, more than a caption's {MAX_CAPTION_BYTES:,}")
        return "".join(read_lines(file)).strip() or None
    except (OSError, ValueError) as error:
        logger.warning("%s is indexed without its caption: %s", image, error)
        return None
