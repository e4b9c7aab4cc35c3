"""A checkpoint in mteb, as docs/how_to/mteb.md does it: a task of texts and one of images and texts, on mteb's own stand-in data."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoProcessor

from tests.integrations.test_documentation import blocks
from tests.modeling_proclip import tiny


mteb = pytest.importorskip("mteb", reason="mteb needs Python 3.11")


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the example of the page leaves, run on mteb's stand-in tasks."""
    from mteb.mocks.mock_tasks.sts import MockSTSTask
    from mteb.mocks.mock_tasks.zeroshot_classification import MockZeroShotClassificationTask

    monkeypatch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MTEB_CACHE", str(folder / "cache"))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    tiny.model().save_pretrained("my-proclip")
    tiny.processor(prompt_template=tiny.LLAMA3, max_length=200).save_pretrained("my-proclip")
    monkeypatch.setattr(mteb, "get_tasks", lambda names: [MockSTSTask(), MockZeroShotClassificationTask()])
    (block,) = blocks("docs/how_to/mteb.md")
    names = {}
    exec(block, names)
    yield names
    monkeypatch.undo()


def test_a_checkpoint_runs_in_a_text_task_and_an_image_text_task(names):
    results, (text_task, image_task) = names["results"], names["tasks"]
    scores = {result.task_name: result.get_score() for result in results.task_results}
    assert set(scores) == {text_task.metadata.name, image_task.metadata.name}
    assert -1 <= scores[text_task.metadata.name] <= 1
    assert scores[image_task.metadata.name] in (0, 0.5, 1)  # of two images
    assert results.model_name == "owner/my-proclip"  # by its own ModelMeta


def test_images_and_texts_are_embedded_as_by_the_model_itself(names):
    """As mteb hands them over: without the modalities of the ModelMeta the images would be empty."""
    wrapper = names["model"]
    assert wrapper.mteb_model_meta.modalities == ["text", "image"]
    model, processor = AutoModel.from_pretrained("my-proclip"), AutoProcessor.from_pretrained("my-proclip")
    images = [Image.new("RGB", (20, 16), "red"), Image.new("RGB", (16, 30), "green")]
    texts = ["a red fox", "zwei Hunde"]
    with torch.no_grad():
        expected = model(**processor(images=images, text=texts, return_tensors="pt"))
    for column, values, embeds in (
        ("image", images, expected.image_embeds),
        ("text", texts, expected.text_embeds),
    ):
        data = Dataset.from_dict({column: values})
        loader = DataLoader(
            data, batch_size=2, collate_fn=lambda rows: {key: [row[key] for row in rows] for key in rows[0]}
        )
        task = names["tasks"][1].metadata
        found = wrapper.encode(loader, task_metadata=task, hf_split="test", hf_subset="default", batch_size=2)
        np.testing.assert_allclose(found, embeds.numpy(), atol=1e-5)
