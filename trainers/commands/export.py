"""`proclip export`: a checkpoint as ONNX files."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a ProCLIP checkpoint.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the result; new or empty.")],
    format: Annotated[Literal["onnx"], typer.Option(help="What to write.")] = "onnx",
    quantize: Annotated[
        Literal["int8"] | None,
        typer.Option(help="Store most weights in 8 bits: less than half the size, and a little of the score."),
    ] = None,
) -> None:
    """Write the image side and the text side of a checkpoint as two ONNX files, with the processor's files beside them.

    Both are compared with the model before OUT appears: in float32 no number of a unit-length embedding differs by more than 0.0001. Costs
    the model in float32 three times over in memory, and a minute.
    """
    from trainers.export.onnx import export_onnx

    for side in export_onnx(model, output, quantize):
        typer.echo(
            f"{output / side.file}: {side.num_bytes / 1e6:,.0f} MB; against the model: largest difference {side.largest_difference:.1e}, "
            f"lowest cosine {side.lowest_cosine:.4f}"
        )
