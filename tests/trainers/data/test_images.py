"""Images as datasets hold them. What the decoder makes of their pixels is in `tests/modeling_proclip/test_images.py`."""

import io

import numpy as np
import pytest
from PIL import Image

from modeling_proclip.images import BrokenImage
from trainers.data.data_folder import DataFolder
from trainers.data.images import decode_stored_image


NOISE = np.random.default_rng(0).integers(0, 256, (12, 10, 3)).astype(np.uint8)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "PNG")
    return file.getvalue()


def test_every_way_to_give_an_image(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    for value in (
        png(),
        Image.open(tmp_path / "a.png"),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        "a.png",
        {"bytes": png(), "path": "elsewhere.png"},
        {"bytes": None, "path": "a.png"},
    ):
        assert np.array_equal(np.asarray(decode_stored_image(value, DataFolder.of(tmp_path))), NOISE)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "there is no image"),
        (b"", "it has no bytes"),
        ({"bytes": b"", "path": "a.png"}, "it has no bytes"),
        ({"bytes": None, "path": None}, "there is no image"),
        (7, "expected an image, found int"),
        ("nowhere.png", "there is no file .*nowhere.png"),
        ("../a.png", "'../a.png' lies outside of|lies outside of"),
        ("http://127.0.0.1:9/a.png", "is an address"),
        ("reference://x::file:///a.json", "is an address"),
        (b"<html>not found</html>", "not an image"),
    ],
)
def test_broken_images_say_why(tmp_path, value, reason):
    with pytest.raises(BrokenImage, match=reason):
        decode_stored_image(value, DataFolder.of(tmp_path))
    with pytest.raises(BrokenImage, match="expected an image, found str 'a.png'"):
        decode_stored_image("a.png")
