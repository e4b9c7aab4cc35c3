"""Images as datasets hold them. What the decoder makes of their pixels is in `tests/modeling_proclip/test_images.py`."""

import io

import numpy as np
import pytest
from PIL import Image

from trainers.data.images import BrokenPicture, decode_picture


NOISE = np.random.default_rng(0).integers(0, 256, (12, 10, 3)).astype(np.uint8)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "PNG")
    return file.getvalue()


def test_every_way_to_give_an_image(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    opened = Image.open(tmp_path / "a.png")
    for value, folder in (
        (png(), None),
        (opened, None),
        (str(tmp_path / "a.png"), None),
        ("a.png", str(tmp_path)),
        ({"bytes": png(), "path": "elsewhere.png"}, None),
        ({"bytes": None, "path": str(tmp_path / "a.png")}, None),
    ):
        assert np.array_equal(np.asarray(decode_picture(value, folder)), NOISE)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "there is no image"),
        (b"", "it has no bytes"),
        ({"bytes": b"", "path": "a.png"}, "it has no bytes"),
        ({"bytes": None, "path": None}, "there is no image"),
        (7, "expected an image, found int"),
        ("nowhere.png", "there is no file nowhere.png"),
        ("http://127.0.0.1:9/a.png", "is an address, and images are read from files only"),
        ("reference://x::file:///a.json", "is an address"),
        (b"<html>not found</html>", "not an image"),
    ],
)
def test_broken_images_say_why(value, reason):
    with pytest.raises(BrokenPicture, match=reason):
        decode_picture(value)
