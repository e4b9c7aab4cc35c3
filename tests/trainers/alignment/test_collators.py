"""Captions by seed, epoch and row; batches of both stages."""

from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor

from tests.trainers.tiny_training import CAPTIONS, TEACHER_STORE, TEXT_STORE, picture_rows, text_rows
from trainers.alignment.collators import ContrastiveTuningCollator, InheritanceCollator
from trainers.data.captions import DrawnCaptions


def drawn(rows, seed: int, epoch: int) -> list[str]:
    captions = DrawnCaptions(rows, seed)
    captions.set_epoch(epoch)
    return [captions[i]["text"] for i in range(len(captions))]


def test_captions_depend_on_seed_epoch_and_row_only():
    rows = text_rows()
    first = drawn(rows, 0, 0)
    assert first == drawn(rows, 0, 0)
    assert first != drawn(rows, 0, 1) and first != drawn(rows, 1, 0)
    assert all(text in captions for text, captions in zip(first, CAPTIONS, strict=True))
    torch.manual_seed(123)
    shuffled = DrawnCaptions(rows, 0)
    assert [shuffled[i]["text"] for i in reversed(range(len(rows)))] == first[::-1]
    assert rows[0]["text"] == CAPTIONS[0], "the rows themselves stay as they are"


def test_rows_of_a_datasets_dataset():
    assert drawn(Dataset.from_list(text_rows()), 0, 1) == drawn(text_rows(), 0, 1)


def test_captions_are_drawn_evenly():
    rows = [{"text": ["a", "b", "c"]}] * 50
    counts = Counter(text for epoch in range(20) for text in drawn(rows, 0, epoch))
    assert all(abs(count - 1000 / 3) < 60 for count in counts.values())


def test_data_workers_that_outlive_an_epoch_follow_it():
    captions = DrawnCaptions(text_rows(), 0)
    loader = DataLoader(captions, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        captions.set_epoch(epoch)
        assert [row["text"] for row in loader] == drawn(text_rows(), 0, epoch)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"caption": "a"}, r"row 0 has no column \"text\", only \['caption'\]"),
        ({"text": []}, "row 0 has no caption"),
    ],
)
def test_rows_without_a_caption_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        DrawnCaptions([row], 0)[0]


def test_a_stream_is_refused():
    with pytest.raises(ValueError, match="is a stream"):
        DrawnCaptions(Dataset.from_list(text_rows()).to_iterable_dataset(), 0)


def test_inheritance_batch():
    batch = InheritanceCollator(TEXT_STORE, TEACHER_STORE)([{"text": CAPTIONS[3]}, {"text": CAPTIONS[5][2]}])
    texts = [CAPTIONS[3][0], CAPTIONS[5][2]]
    assert torch.equal(batch["llm_embeds"], TEXT_STORE.lookup(texts))
    assert torch.equal(batch["teacher_embeds"], TEACHER_STORE.lookup(texts))


def test_a_missing_text_is_named():
    for collate in (InheritanceCollator(TEXT_STORE, TEACHER_STORE), ContrastiveTuningCollator(TEXT_STORE)):
        with pytest.raises(KeyError, match="nobody stored this"):
            collate([{"text": "nobody stored this", "pixel_values": torch.zeros(3, 8, 8)}])


def test_pixel_values_of_any_kind():
    rows = picture_rows(2)
    expected = torch.stack([row["pixel_values"] for row in rows])
    for kind in (torch.as_tensor, np.asarray, lambda pixels: pixels.double().numpy(), lambda pixels: pixels.tolist()):
        batch = ContrastiveTuningCollator(TEXT_STORE)(
            [{**row, "pixel_values": kind(row["pixel_values"])} for row in rows]
        )
        assert batch["pixel_values"].dtype == torch.float32 and torch.equal(batch["pixel_values"], expected)
        assert torch.equal(batch["llm_embeds"], TEXT_STORE.lookup([CAPTIONS[0][0], CAPTIONS[1][0]]))


def test_images_are_decoded_as_everywhere():
    """Also where the trainer has a bare image processor, which would read a float image as black and make gigabytes of a strip."""
    collate = ContrastiveTuningCollator(TEXT_STORE, CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8))
    transparent = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    white = [{"image": image, "text": CAPTIONS[0]} for image in (transparent, Image.new("RGB", (8, 8), "white"))]
    first, second = collate(white)["pixel_values"]
    assert torch.equal(first, second)
    for image, reason in ((Image.new("RGB", (30_000, 1)), "a strip of 30000 x 1"), (Image.new("F", (8, 8)), "floats")):
        with pytest.raises(ValueError, match=f"the image of row 1 of the batch cannot be read: .*{reason}"):
            collate([white[0], {"image": image, "text": CAPTIONS[0]}])


def test_pictures_go_through_the_image_processor():
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8)
    images = [Image.new("RGB", (20, 10), color) for color in ("red", "blue")]
    rows = [{"image": image, "text": captions} for image, captions in zip(images, CAPTIONS, strict=False)]
    batch = ContrastiveTuningCollator(TEXT_STORE, processor)(rows)
    assert torch.equal(batch["pixel_values"], processor(images, return_tensors="pt").pixel_values)
    with pytest.raises(ValueError, match="pass processing_class=processor"):
        ContrastiveTuningCollator(TEXT_STORE)(rows)
    with pytest.raises(ValueError, match=r"\"pixel_values\".*or \"image\".*\['text'\]"):
        ContrastiveTuningCollator(TEXT_STORE)([{"text": "caption 0"}])
