"""The decoder: every kind of image as a viewer shows it, sound pixels kept, and a reason for each image that is refused."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from modeling_proclip.images import MAX_PIXELS, BrokenImage, decode_image


NOISE = np.random.default_rng(0).integers(0, 256, (12, 10, 4)).astype(np.uint8)


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A grey PNG of 8 bits without pixels, its header and `chunks`."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


RGB = Image.fromarray(NOISE[..., :3])
PALETTE = RGB.quantize(16)
KINDS = {
    "RGB": file_of(RGB),
    "RGBA": file_of(Image.fromarray(NOISE)),
    "grey": file_of(Image.fromarray(NOISE[..., 0])),
    "grey and alpha": file_of(Image.fromarray(NOISE[..., :2], mode="LA")),
    "palette": file_of(PALETTE),
    "palette with a transparent colour": file_of(PALETTE, transparency=3),
    "bilevel": file_of(Image.fromarray(NOISE[..., 0]).convert("1")),
    "CMYK": file_of(RGB.convert("CMYK"), "JPEG"),
    "GIF": file_of(PALETTE, "GIF"),
    "animated GIF": file_of(PALETTE, "GIF", save_all=True, append_images=[Image.new("P", (10, 12), 1)]),
    "WebP": file_of(Image.fromarray(NOISE), "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_what_a_viewer_shows(kind):
    """Pixel by pixel: the colour as far as it is opaque, and white behind it."""
    decoded = decode_image(KINDS[kind])
    assert decoded.mode == "RGB" and decoded.size == (10, 12)
    pixels = np.asarray(Image.open(io.BytesIO(KINDS[kind])).convert("RGBA"), dtype=float)
    opaque = pixels[..., 3:] / 255
    expected = pixels[..., :3] * opaque + 255 * (1 - opaque)
    assert np.abs(np.asarray(decoded) - expected).max() <= 1


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.array([[0, 257, 40000, 65535]], dtype=np.uint16)),
        Image.fromarray(np.array([[0, 257, 40000, 65535]], dtype=np.int32)),
    ],
)
def test_sixteen_bits_are_scaled_to_eight(image):
    assert np.asarray(decode_image(image))[0].tolist() == [
        [0] * 3,
        [1] * 3,
        [156] * 3,
        [255] * 3,
    ]  # 40000 / 257 = 155.6


def test_a_transparent_grey_of_sixteen_bits_is_white():
    image = file_of(Image.fromarray(np.array([[0, 300]], dtype=np.uint16)), transparency=300)
    assert np.asarray(decode_image(image))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_the_camera_s_rotation_is_undone_once(kind, orientation):
    data = file_of(RGB, kind, exif=exif(orientation))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    decoded = decode_image(data)
    assert np.array_equal(np.asarray(decoded), expected)
    assert np.array_equal(np.asarray(decode_image(decoded)), expected), "decoding again changes nothing"


@pytest.mark.filterwarnings("ignore:Tag data larger", "ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "tags",
    [
        b"garbage",
        b"Exif\0\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x09\0junk" * 3,
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x05\0\0\0\xff\xff\xff\x7f",
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_data_do_not_lose_a_sound_image(kind, tags):
    data = file_of(RGB, kind, exif=tags)
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_an_image_in_memory_stays_as_it_is():
    image = Image.open(io.BytesIO(KINDS["RGBA"]))
    decode_image(image)
    assert image.mode == "RGBA" and np.array_equal(np.asarray(image), NOISE)


def test_every_way_to_give_an_image(tmp_path):
    (tmp_path / "a.png").write_bytes(KINDS["RGB"])
    for source in (KINDS["RGB"], RGB, Image.open(tmp_path / "a.png"), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(np.asarray(decode_image(source)), NOISE[..., :3])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", "not an image of a format that Pillow reads"),
        (b"<html>not found</html>", "not an image of a format that Pillow reads"),
        (KINDS["RGB"][: len(KINDS["RGB"]) // 2], "OSError|SyntaxError"),
        (file_of(Image.new("RGB", (60, 60)), "JPEG")[:400], "OSError"),
        (KINDS["RGB"][:30] + b"\x00" * 40 + KINDS["RGB"][70:], "not an image of a format that Pillow reads"),
        (png(8, 8, (b"zTXt", b"k\0\0" + zlib.compress(b"A" * 2_000_000))), "ValueError: Decompressed data too large"),
        ("nowhere.png", "there is no file nowhere.png"),
        (os.path.dirname(__file__), "there is no file"),
        (png(100_000, 100_000), "decompression bomb"),
        (file_of(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "its pixels are floats"),
        (Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "from 0 to 70000"),
        (Image.fromarray(np.array([[-1, 7]], dtype=np.int32)), "from -1 to 7"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        (png(30_000, 1), "a strip of 30000 x 1 pixels"),
        (png(10, 2001), "a strip of 10 x 2001 pixels"),
    ],
)
def test_broken_images_say_why(source, reason):
    with pytest.raises(BrokenImage, match=reason):
        decode_image(source)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BrokenImage, match="there is no file"):
        decode_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "kind", [struct.error, SyntaxError, MemoryError, RecursionError, IndexError, Image.DecompressionBombError]
)
def test_whatever_a_reader_raises(kind, monkeypatch):
    def load(image):
        raise kind("two\nlines")

    monkeypatch.setattr(Image.Image, "load", load)
    with pytest.raises(BrokenImage, match="two.lines"):
        decode_image(RGB)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_they_are_decoded():
    with pytest.raises(BrokenImage, match="more than 89,478,485"):
        decode_image(png(MAX_PIXELS // 1000 + 1, 1001))


def test_a_long_image_within_the_limit():
    assert decode_image(file_of(Image.new("L", (2000, 10)))).size == (2000, 10)
