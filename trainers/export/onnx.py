"""A checkpoint as two ONNX files, compared with the model before they are left anywhere."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
import onnxruntime
import onnxscript  # noqa: F401  by which torch translates: a missing package is named before a model is loaded
import torch
from transformers import AutoModel, AutoProcessor, ProcessorMixin

import modeling_proclip  # noqa: F401  registers the classes
from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from modeling_proclip.conversion.output import new_folder

from .int8 import quantize_weights
from .sides import ImageSide, Side, TextSide, examples, export_program


# Most by which a number of a unit-length embedding may differ from the model's: the rounding of float32 over 40 layers is a tenth of it.
TOLERANCE = 1e-4
# Lowest cosine between an int8 embedding and the model's. Below, the quantisation has lost the text or the image.
INT8_MIN_COSINE = 0.9

FILES = {"image": "vision_model.onnx", "text": "text_model.onnx"}  # as optimum and transformers.js name them
# The largest protobuf. What is larger has its weights in a file beside it.
_MAX_PROTOBUF = 2 * 10**9


@dataclass(frozen=True)
class ExportedSide:
    """One file of an export: its name, its size with weights beside it, and how far its embeddings are from the model's on the examples."""

    file: str
    num_bytes: int
    largest_difference: float
    lowest_cosine: float


def export_onnx(name_or_path: str, output: Path, quantize: Literal["int8"] | None = None) -> list[ExportedSide]:
    """Write `vision_model.onnx`, `text_model.onnx` and the processor's files to `output`.

    Both take batches of any size and texts of any length, and give unit-length float32 embeddings. The logit scale (the multiplier) and the
    logit bias are in the files' metadata.

    Args:
        name_or_path: folder or Hub name of a ProCLIP checkpoint. It is exported in float32, whatever it is stored in.
        output: a new or empty folder.
        quantize: "int8" stores most weights of matrix products and embedding tables in 8 bits; see [`trainers.export.int8.quantize_weights`].

    Raises:
        ValueError: If `output` is no empty folder, the model is no whole ProCLIP, a side cannot be exported, or its embeddings are further from
            the model's than `TOLERANCE`, or `INT8_MIN_COSINE` for int8. Nothing is left in `output` then.
        OSError: If nothing can be loaded from there.
    """
    with new_folder(output) as folder:
        model = AutoModel.from_pretrained(name_or_path, dtype=torch.float32)
        if not isinstance(model, ProCLIPModel):
            raise ValueError(f"{name_or_path} is a {type(model).__name__}, not a ProCLIP: export it with optimum")
        processor = AutoProcessor.from_pretrained(name_or_path)
        model.eval()
        done = [_export_side(side, processor, folder, quantize) for side in (ImageSide(model), TextSide(model))]
        # Not with the files by which sentence-transformers finds weights to load: there are none.
        ProcessorMixin.save_pretrained(processor, folder)
    return done


def _export_side(
    side: Side, processor: ProCLIPProcessor, folder: Path, quantize: Literal["int8"] | None
) -> ExportedSide:
    file = folder / FILES[side.name]
    _translate(side, processor).save(file)  # with the weights beside it, if they are too many for one file
    gc.collect()
    difference, cosine = _compare(side, processor, file)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{file.name} would give embeddings that differ from the model's by {difference:.2g} (at most {TOLERANCE:g} is rounding), so nothing "
            "was written: try another release of torch or onnxruntime"
        )
    if quantize is not None:
        _quantize(file)
        difference, cosine = _compare(side, processor, file)
        if not cosine >= INT8_MIN_COSINE:
            raise ValueError(
                f"{file.name} in int8 would give embeddings with a cosine of {cosine:.3f} with the model's (at least {INT8_MIN_COSINE} is asked), "
                "so nothing was written: 8 bits are too few for this model; export it without --quantize"
            )
    return ExportedSide(file.name, _num_bytes(file), difference, cosine)


def _translate(side: Side, processor: ProCLIPProcessor) -> torch.onnx.ONNXProgram:
    translated = torch.onnx.export(
        export_program(side, processor),
        output_names=[side.output_name],
        dynamic_shapes=side.dynamic_shapes,  # for the names of the axes
        dynamo=True,
        verbose=False,
    )
    assert translated is not None  # it is None where torch writes the file itself
    model, facts = side.model, translated.model.metadata_props
    facts["logit_scale"] = str(model.logit_scale.exp().item())
    if model.logit_bias is not None:
        facts["logit_bias"] = str(model.logit_bias.item())
    return translated


def _compare(side: Side, processor: ProCLIPProcessor, file: Path) -> tuple[float, float]:
    """Largest difference and lowest cosine between the embeddings of `file` and those of the model."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    differences, cosines = [], []
    for inputs in examples(side, processor):
        (found,) = session.run([side.output_name], {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            expected = side(**inputs)
        differences.append((torch.from_numpy(found) - expected).abs().max())
        cosines.append((torch.from_numpy(found) * expected).sum(dim=1).min())
    return torch.stack(differences).max().item(), torch.stack(cosines).min().item()


def _quantize(file: Path) -> None:
    """Replace `file`, and the weights beside it if there are any, by the same in int8."""
    model = onnx.load(file)
    for part in _parts(file):
        part.unlink()
    quantize_weights(model)
    onnx.save(model, file, save_as_external_data=model.ByteSize() > _MAX_PROTOBUF, location=f"{file.name}.data")


def _parts(file: Path) -> list[Path]:
    """`file`, and the file of its weights if they are too many for one."""
    return list(file.parent.glob(f"{file.name}*"))


def _num_bytes(file: Path) -> int:
    return sum(part.stat().st_size for part in _parts(file))
