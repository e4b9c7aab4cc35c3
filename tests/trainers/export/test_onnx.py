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
from trainers.export.int8 import quantize_weights
from trainers.export.sides import ImageSide, TextSide


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
    text_model = "text_model.onnx"
    assert (folder / "int8" / text_model).stat().st_size < (folder / "onnx" / text_model).stat().st_size
    assert {file.name for file in (folder / "int8").iterdir()} == {file.name for file in (folder / "onnx").iterdir()}


def test_int8_follows_the_blocks_of_the_weights():
    """A table, and products in ten layers, the first two of which keep float32."""
    generator = torch.Generator().manual_seed(0)
    table, matrices = (torch.randn(*shape, generator=generator).numpy() for shape in ((50, 40), (10, 40, 40)))
    table[:, 0] *= 1000  # a large weight, which must not coarsen those of other blocks
    nodes = [onnx.helper.make_node("Gather", ["table", "ids"], ["x0"])]
    for number in range(10):
        node = onnx.helper.make_node("MatMul", [f"x{number}", f"w{number}"], [f"x{number + 1}"])
        scopes = onnx.StringStringEntryProto(key="pkg.torch.onnx.name_scopes", value=f"['', 'model.h.{number}.mlp']")
        node.metadata_props.append(scopes)
        nodes.append(node)
    weights = {"table": table, **{f"w{number}": matrix for number, matrix in enumerate(matrices)}}
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])],
        [onnx.helper.make_tensor_value_info(f"x{n}", onnx.TensorProto.FLOAT, ["n", 40]) for n in (0, 2)],
        [onnx.numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    quantize_weights(model)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds == ["GatherBlockQuantized", *["MatMul"] * 2, *["MatMulNBits"] * 8]
    assert {tensor.name for tensor in model.graph.initializer if tensor.name in weights} == {"w0", "w1"}
    (rows, third) = onnxruntime.InferenceSession(model.SerializeToString()).run(
        None, {"ids": torch.arange(50).numpy()}
    )
    for block in (slice(0, 32), slice(32, 40)):
        step = abs(table[:, block]).max(axis=1, keepdims=True) / 127
        assert (abs(rows[:, block] - table[:, block]) <= 0.501 * step).all()
    assert abs(third - rows @ matrices[0] @ matrices[1]).max() < 1e-2


QWEN3 = {"model_type": "qwen3", **tiny.TEXT}
GEMMA3 = {"model_type": "gemma3_text", "sliding_window": 4, **tiny.TEXT}
SIGLIP = {**tiny.VISION, "model_type": "siglip_vision_model"}
EVA = {
    **{key: value for key, value in tiny.VISION.items() if key != "projection_dim"},
    "model_type": "proclip_eva_vision",
}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (TextSide, {"text_config": QWEN3}),
        (TextSide, {"text_config": GEMMA3}),
        (ImageSide, {"vision_config": SIGLIP}),
        (ImageSide, {"vision_config": EVA}),
    ],
    ids=["Qwen3", "Gemma3", "SigLIP", "EVA"],
)
def test_other_families(kind, config, tmp_path):
    """In int8, which is compared with the model too; a float32 file that differs by more than 1e-4 is refused before."""
    side = kind(tiny.model(**config))
    done = export._export_side(side, tiny.processor(prompt_template=tiny.LLAMA3, max_length=40), tmp_path, "int8")
    assert 0.9 < done.lowest_cosine < 0.999999


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
