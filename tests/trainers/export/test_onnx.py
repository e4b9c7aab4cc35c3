"""`proclip export`: two ONNX files and the processor, equal to the model; or one line and nothing in the folder."""

import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from tests.integrations.test_documentation import run_page
from tests.modeling_proclip import tiny
from trainers.cli import app
from trainers.export import onnx as export


TEXTS = ["a red fox", "zwei Hunde", "", "word " * 100]
programs: dict[str, torch.onnx.ONNXProgram] = {}  # by side
IMAGES = [Image.new("RGB", (20, 16), "red"), Image.new("RGBA", (16, 30), (0, 0, 255, 40))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in model/, and its export in onnx/."""
    folder = tmp_path_factory.mktemp("here")
    tiny.model(logit_bias_init_value=-2.0).save_pretrained(folder / "model")
    tiny.processor(prompt_template=tiny.LLAMA3, max_length=40).save_pretrained(folder / "model")
    translate = export._translate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            export, "_translate", lambda side, processor: programs.setdefault(side.name, translate(side, processor))
        )
        result = CliRunner().invoke(app, ["export", str(folder / "model"), str(folder / "onnx")])
    assert result.exit_code == 0, result.output
    for line in result.stdout.splitlines():
        assert "lowest cosine 1.0000" in line
    return folder


@pytest.fixture
def translated_before(monkeypatch):
    """Tracing and translating take seconds, and are done once."""
    monkeypatch.setattr(export, "_translate", lambda side, processor: programs[side.name])


def test_the_files_give_the_models_embeddings(folder):
    model, processor = AutoModel.from_pretrained(folder / "model"), AutoProcessor.from_pretrained(folder / "onnx")
    inputs = processor(text=TEXTS, images=IMAGES, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs)
    for file, output in (("text_model.onnx", "text_embeds"), ("vision_model.onnx", "image_embeds")):
        session = onnxruntime.InferenceSession(folder / "onnx" / file)
        given = {one.name: inputs[one.name].numpy() for one in session.get_inputs()}
        (found,) = session.run([output], given)
        torch.testing.assert_close(torch.from_numpy(found), expected[output], atol=1e-5, rtol=0)
        metadata = {entry.key: float(entry.value) for entry in onnx.load(folder / "onnx" / file).metadata_props}
        assert metadata["logit_scale"] == pytest.approx(model.logit_scale.exp().item())
        assert metadata["logit_bias"] == pytest.approx(-2.0)


def test_shapes_have_names(folder):
    session = onnxruntime.InferenceSession(folder / "onnx" / "text_model.onnx")
    assert {one.name: one.shape for one in session.get_inputs()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), ["batch_size", "sequence_length"]
    )
    (image,) = onnxruntime.InferenceSession(folder / "onnx" / "vision_model.onnx").get_inputs()
    assert image.shape == ["batch_size", 3, 16, 16]


def test_nothing_but_the_export_is_in_the_folder(folder):
    names = {file.name for file in (folder / "onnx").iterdir()}
    assert {"text_model.onnx", "vision_model.onnx", "processor_config.json", "tokenizer.json"} <= names
    assert not {"modules.json", "model.safetensors", "float32.onnx"} & names
    assert {file.name for file in folder.iterdir()} == {"model", "onnx"}


def test_int8_is_smaller_and_near(folder, translated_before):
    result = CliRunner().invoke(app, ["export", str(folder / "model"), str(folder / "int8"), "--quantize", "int8"])
    assert result.exit_code == 0, result.output
    model, processor = AutoModel.from_pretrained(folder / "model"), AutoProcessor.from_pretrained(folder / "int8")
    inputs = processor(text=TEXTS, return_tensors="pt")
    (found,) = onnxruntime.InferenceSession(folder / "int8/text_model.onnx").run(
        None, {k: v.numpy() for k, v in inputs.items()}
    )
    with torch.no_grad():
        cosines = (model(**inputs).text_embeds * torch.from_numpy(found)).sum(dim=1)
    assert 0.9 < cosines.min() < 0.99999
    for file in ("text_model.onnx", "vision_model.onnx"):
        assert (folder / "int8" / file).stat().st_size < (folder / "onnx" / file).stat().st_size
    assert {file.name for file in (folder / "int8").iterdir()} == {file.name for file in (folder / "onnx").iterdir()}


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("TOLERANCE", -1.0, "vision_model.onnx would give embeddings that differ from the model's by"),
        ("INT8_MIN_COSINE", 1.1, "vision_model.onnx in int8 would give embeddings with a cosine of"),
    ],
)
def test_a_file_that_differs_from_the_model_is_not_left(folder, translated_before, monkeypatch, limit, value, message):
    monkeypatch.setattr(export, limit, value)
    result = CliRunner().invoke(app, ["export", str(folder / "model"), str(folder / "other"), "--quantize", "int8"])
    assert result.exit_code == 1 and f"error: {message}" in result.stderr.splitlines()[-1]
    assert not [file.name for file in folder.iterdir() if "other" in file.name]


def test_what_cannot_be_exported_is_refused_in_one_line(folder, tmp_path):
    tiny.clip().save_pretrained(tmp_path / "clip")
    for model, output, message in (
        (folder / "model", folder / "model", "is there already, and is not an empty folder"),
        (tmp_path / "clip", tmp_path / "new", "is a CLIPModel, not a ProCLIP"),
    ):
        result = CliRunner().invoke(app, ["export", str(model), str(output)])
        assert result.exit_code == 1 and message in result.stderr.splitlines()[-1], result.output
    assert not (tmp_path / "new").exists()


def test_the_examples_of_the_page_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-proclip").symlink_to(folder / "model")
    (tmp_path / "my-proclip-onnx").symlink_to(folder / "onnx")
    IMAGES[1].save("image.png")
    names = run_page("docs/how_to/deploy.md", {})
    model, processor = names["model"], names["processor"]
    inputs = processor(text=["a red fox", "a green house"], images=["image.png"], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image - model.logit_bias
    torch.testing.assert_close(torch.from_numpy(names["logits"]), expected, atol=1e-3, rtol=0)
    assert isinstance(names["program"], torch.export.ExportedProgram)
