"""ProCLIPProcessor on images of every kind, however they come, and what it refuses of them."""

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_proclip import ProCLIPProcessor
from tests.modeling_proclip import tiny


@pytest.fixture
def processor() -> ProCLIPProcessor:
    return tiny.processor(prompt_template=tiny.LLAMA3)


def pixels(processor: ProCLIPProcessor, image) -> np.ndarray:
    """`(16, 16, 3)` values of 0..255 that reach the model, where a picture of 16 x 16 is neither resized nor cropped."""
    (array,) = processor(images=image, do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"]
    return array.transpose(1, 2, 0).round().astype(int)


def halves(left, right) -> np.ndarray:
    picture = np.empty((16, 16, 3), dtype=int)
    picture[:, :8], picture[:, 8:] = left, right
    return picture


def two_halves(mode: str, left, right) -> Image.Image:
    image = Image.new(mode, (16, 16), left)
    image.paste(right, (8, 0, 16, 16))
    return image


def transparent_palette() -> Image.Image:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.paste(1, (8, 0, 16, 16))
    image.info["transparency"] = 1
    return image


def sixteen_bits(mode: str) -> Image.Image:
    array = np.zeros((16, 16), dtype=">u2" if mode == "I;16B" else np.uint16)
    array[:, :8], array[:, 8:] = 128 * 257, 255 * 257
    if mode == "I":
        return Image.fromarray(array.astype(np.int32))
    return Image.frombytes(mode, (16, 16), array.tobytes())


def rotated() -> Image.Image:
    """Stored with white on top; the camera says that its top is the picture's right side (orientation 6)."""
    image = Image.new("RGB", (16, 16), "black")
    image.paste((255, 255, 255), (0, 0, 16, 8))
    image.getexif()[0x0112] = 6
    return image


IMAGES = {
    "RGB": (two_halves("RGB", (10, 20, 30), (200, 100, 0)), halves((10, 20, 30), (200, 100, 0))),
    "grey": (two_halves("L", 7, 250), halves(7, 250)),
    "1 bit": (two_halves("1", 0, 1), halves(0, 255)),
    "RGBA": (two_halves("RGBA", (200, 0, 0, 255), (0, 0, 0, 0)), halves((200, 0, 0), 255)),
    "half transparent": (two_halves("RGBA", (0, 0, 0, 51), (100, 100, 100, 255)), halves(204, 100)),
    "grey with alpha": (two_halves("LA", (40, 255), (0, 0)), halves(40, 255)),
    "palette": (two_halves("RGB", (200, 0, 0), (0, 200, 0)).convert("P", palette=1), halves((200, 0, 0), (0, 200, 0))),
    "transparent palette": (transparent_palette(), halves((200, 0, 0), 255)),
    "CMYK": (two_halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), halves((255, 0, 0), 0)),
    "YCbCr": (two_halves("RGB", (90, 90, 90), (250, 250, 250)).convert("YCbCr"), halves(90, 250)),
    "16 bits": (sixteen_bits("I;16"), halves(128, 255)),
    "16 bits, big-endian": (sixteen_bits("I;16B"), halves(128, 255)),
    "16 bits as 32": (sixteen_bits("I"), halves(128, 255)),
    "rotated": (rotated(), halves(0, 255)),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_of_every_kind(processor, kind):
    image, expected = IMAGES[kind]
    before = image.mode, image.tobytes()
    np.testing.assert_allclose(pixels(processor, image), expected, atol=1)
    assert (image.mode, image.tobytes()) == before


@pytest.mark.parametrize("kind", ["RGBA", "transparent palette", "16 bits", "1 bit", "rotated"])
def test_images_in_files(processor, kind, tmp_path):
    image, expected = IMAGES[kind]
    path = tmp_path / "picture.png"
    image.save(path, exif=image.getexif(), **({"transparency": 1} if kind == "transparent palette" else {}))
    np.testing.assert_allclose(pixels(processor, path), expected, atol=1)
    np.testing.assert_allclose(pixels(processor, str(path)), expected, atol=1)


def test_a_batch_of_mixed_images(processor):
    images = [image for image, _ in IMAGES.values()]
    batch = processor(images=images, return_tensors="pt")["pixel_values"]
    assert batch.shape == (len(images), 3, 16, 16) and batch.dtype == torch.float32
    for row, image in zip(batch, images, strict=True):
        assert torch.equal(row, processor(images=image, return_tensors="pt")["pixel_values"][0])


def test_normalised_values(processor):
    image, _ = IMAGES["RGB"]
    mean, std = np.array(processor.image_processor.image_mean), np.array(processor.image_processor.image_std)
    got = processor(images=image, return_tensors="pt")["pixel_values"][0, :, 0, 0].numpy()
    np.testing.assert_allclose(got, (np.array([10, 20, 30]) / 255 - mean) / std, atol=1e-5)


def test_arrays_and_tensors(processor):
    array = np.zeros((16, 16, 3), dtype=np.uint8)
    array[:, 8:] = 255
    np.testing.assert_array_equal(pixels(processor, array), halves(0, 255))
    np.testing.assert_array_equal(pixels(processor, torch.from_numpy(array).permute(2, 0, 1)), halves(0, 255))


def test_bad_images(processor, tmp_path):
    with pytest.raises(ValueError, match="images is an empty list"):
        processor(images=[])
    with pytest.raises((ValueError, TypeError)):
        processor(images=[None])
    missing = tmp_path / "nothing.png"
    with pytest.raises(ValueError, match=f"images .{missing}. cannot be read: there is no file {missing}"):
        processor(images=str(missing))
    cut = tmp_path / "cut.png"
    two_halves("RGB", "red", "blue").save(cut)
    cut.write_bytes(cut.read_bytes()[:60])
    for image in (cut, Image.open(cut)):
        with pytest.raises(ValueError, match=rf"images\[1\] .{cut}. cannot be read: OSError"):
            processor(images=[IMAGES["RGB"][0], image])


def test_an_image_at_an_address(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    two_halves("RGBA", (200, 0, 0, 255), (0, 0, 0, 0)).save(tmp_path / "a.png")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            np.testing.assert_allclose(pixels(processor, f"{url}/a.png"), halves((200, 0, 0), 255), atol=1)
            with pytest.raises(ValueError, match=rf"images .{url}/b.png. cannot be read: .*404"):
                processor(images=f"{url}/b.png")
        finally:
            server.shutdown()


def test_text_and_images_together(processor):
    batch = processor(images=IMAGES["RGB"][0], text=["a", "b c"], return_tensors="pt")
    assert set(batch) == set(processor.model_input_names)
    assert batch["pixel_values"].shape == (1, 3, 16, 16) and batch["input_ids"].shape[0] == 2
    assert tiny.model()(**batch).logits_per_image.shape == (1, 2)
