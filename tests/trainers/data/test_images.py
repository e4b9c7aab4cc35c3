"""Pictures of every kind that lies on disks, as the image processor would see them; broken ones are refused with a reason."""

import io

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from trainers.data.images import MAX_PIXELS, BrokenPicture, decode_picture


NOISE = np.random.default_rng(0).integers(0, 256, (12, 10, 4)).astype(np.uint8)


def file_of(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def palette(transparent: bool) -> Image.Image:
    picture = Image.fromarray(NOISE[..., :3]).quantize(16)
    if transparent:
        picture.info["transparency"] = 3
    return picture


KINDS = {
    "RGB": file_of(Image.fromarray(NOISE[..., :3])),
    "RGBA": file_of(Image.fromarray(NOISE)),
    "gray": file_of(Image.fromarray(NOISE[..., 0])),
    "gray and alpha": file_of(Image.fromarray(NOISE[..., :2], mode="LA")),
    "palette": file_of(palette(False)),
    "palette with a transparent colour": file_of(palette(True), transparency=3),
    "bilevel": file_of(Image.fromarray(NOISE[..., 0]).convert("1")),
    "CMYK": file_of(Image.fromarray(NOISE[..., :3]).convert("CMYK"), "JPEG"),
    "GIF": file_of(palette(False), "GIF"),
    "WebP": file_of(Image.fromarray(NOISE), "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_picture_is_what_the_processor_would_see(kind):
    """Of the picture as it is: so training and searching, where the processor gets the opened file, see the same."""
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    decoded = decode_picture(KINDS[kind])
    assert decoded.mode == "RGB" and decoded.size == (10, 12)
    expected = processor(Image.open(io.BytesIO(KINDS[kind])), return_tensors="pt")["pixel_values"]
    assert (processor(decoded, return_tensors="pt")["pixel_values"] - expected).abs().max() <= 1e-6


def test_sixteen_bits_are_scaled_to_eight():
    values = np.array([[0, 257, 40000, 65535]], dtype=np.uint16)
    decoded = decode_picture(file_of(Image.fromarray(values)))
    assert np.asarray(decoded)[0].tolist() == [[0] * 3, [1] * 3, [156] * 3, [255] * 3]  # 40000 / 257 = 155.6


def test_a_picture_is_turned_upright():
    picture = Image.new("RGB", (20, 10))
    picture.paste("red", (0, 0, 5, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees clockwise
    decoded = decode_picture(file_of(picture, exif=exif))
    assert decoded.size == (10, 20)
    assert decoded.getpixel((5, 2)) == (255, 0, 0) and decoded.getpixel((5, 15)) == (0, 0, 0)


def test_every_way_to_give_a_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(KINDS["RGB"])
    opened = Image.open(tmp_path / "a.png")
    for value, folder in (
        (KINDS["RGB"], None),
        (opened, None),
        (str(tmp_path / "a.png"), None),
        ("a.png", str(tmp_path)),
        ({"bytes": KINDS["RGB"], "path": "elsewhere.png"}, None),
        ({"bytes": None, "path": str(tmp_path / "a.png")}, None),
        ((tmp_path / "a.png").as_uri(), None),
    ):
        assert np.array_equal(np.asarray(decode_picture(value, folder)), NOISE[..., :3])


def bomb() -> bytes:
    """A PNG of a few bytes whose header promises 100,000 x 100,000 pixels."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "there is no picture"),
        (b"", "it has no bytes"),
        ({"bytes": b"", "path": "a.png"}, "it has no bytes"),
        ({"bytes": None, "path": None}, "there is no picture"),
        (b"<html>not found</html>", "it is of no kind that Pillow reads"),
        (KINDS["RGB"][: len(KINDS["RGB"]) // 2], "OSError|SyntaxError"),
        (file_of(Image.new("RGB", (60, 60)), "JPEG")[:400], "OSError"),
        (KINDS["RGB"][:30] + b"\x00" * 40 + KINDS["RGB"][70:], "it is of no kind that Pillow reads"),
        ("nowhere.png", "FileNotFoundError"),
        (bomb(), "decompression bomb"),
        (7, "a int is no picture"),
        (file_of(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "mode F"),
    ],
)
def test_broken_pictures_say_why(value, reason):
    with pytest.raises(BrokenPicture, match=reason):
        decode_picture(value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_they_are_decoded():
    picture = Image.new("1", (MAX_PIXELS // 1000 + 1, 1001))
    with pytest.raises(BrokenPicture, match="more than 89,478,485"):
        decode_picture(file_of(picture))
