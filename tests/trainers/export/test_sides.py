"""`torch.export` follows both sides of a model; what comes out takes batches and texts of other sizes."""

import pytest
import torch

from modeling_proclip import ProCLIPModel
from tests.modeling_proclip import tiny
from trainers.export.sides import ImageSide, TextSide, examples, export_program


@pytest.mark.parametrize("kind", [ImageSide, TextSide])
def test_an_exported_program_gives_the_models_embeddings(kind):
    model, processor = tiny.model(), tiny.processor(prompt_template=tiny.LLAMA3, max_length=40)
    side = kind(model)
    program = export_program(side, processor).module()
    with torch.no_grad():
        for inputs in examples(side, processor):
            found = program(**inputs)
            torch.testing.assert_close(found, side(**inputs), atol=1e-6, rtol=0)
            expected = getattr(model(**inputs), side.output_name)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
            assert found.shape == (len(next(iter(inputs.values()))), 16)


def test_the_examples_differ_in_size_and_length():
    texts = examples(TextSide(tiny.model()), tiny.processor(prompt_template=tiny.LLAMA3, max_length=40))
    shapes = [tuple(batch["input_ids"].shape) for batch in texts]
    assert len({size for size, _ in shapes}) == len({length for _, length in shapes}) == 3
    assert max(length for _, length in shapes) == 40  # one text is cut


def test_images_that_keep_their_aspect_ratio_are_refused():
    model = ProCLIPModel.from_vision_text_pretrained(tiny.naflex(), tiny.LLAMA_DIR)
    processor = tiny.processor(images=tiny.naflex_image_processor())
    with pytest.raises(
        ValueError, match="image side cannot be exported: its inputs are pixel_values, pixel_attention"
    ):
        export_program(ImageSide(model), processor)
