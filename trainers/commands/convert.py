"""`proclip convert`: published checkpoints into Transformers folders."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import print_facts


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A .pt, .bin or .safetensors file, a folder, or either on the Hub: owner/name, owner/name/path/in/it."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the result; new or empty.")],
    text_model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub name of the LLM; the result names it and holds its tokenizer."),
    ] = None,
    text_model_revision: Annotated[str | None, typer.Option(help="Revision of the LLM on the Hub.")] = None,
    prompt_template: Annotated[
        str | None, typer.Option(help="Prompt template of the LLM; must hold {text}. Default: from its chat template.")
    ] = None,
    vision_processor: Annotated[
        str | None, typer.Option(help="Folder or Hub name of an image processor. Default: the tower's usual one.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="PEFT adapter to merge into an LLM. Repeat for more, in order.")
    ] = None,
    head_width: Annotated[int, typer.Option(min=1, help="Width of an attention head of the vision tower.")] = 64,
    quick_gelu: Annotated[
        bool | None, typer.Option(help="Activation of OpenAI's tower. Default: QuickGELU, as OpenAI's weights need.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels a side, if not as stored; position embeddings are resized.")
    ] = None,
    patch_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels a side of EVA's patches, if not as stored.")
    ] = None,
    rope_pretrained_grid: Annotated[
        int, typer.Option(min=1, help="Patches a side that EVA02's rotary positions were made for.")
    ] = 16,
    adapter_input_norm: Annotated[
        Literal["l2", "none"] | None,
        typer.Option(help="Input norm of the text adapter. Default: as published for the layout."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="dtype of the result. Default: as stored.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a source on the Hub.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what is there, and write nothing.")] = False,
) -> None:
    """Turn a published ProCLIP or LLM2CLIP checkpoint, or its LLM, into a Transformers folder that needs no remote code.

    Sizes are read from the tensors' shapes. Nothing in the file is run: a pickle that needs more than tensors is refused. Costs one pass
    over the file, and memory for the file and one tensor.
    """
    from modeling_proclip import convert as run

    report = run(
        source,
        output,
        head_width=head_width,
        quick_gelu=quick_gelu,
        image_size=image_size,
        patch_size=patch_size,
        rope_pretrained_grid=rope_pretrained_grid,
        adapter_input_norm=adapter_input_norm,
        vision_processor=vision_processor,
        text_model=text_model,
        text_model_revision=text_model_revision,
        prompt_template=prompt_template,
        lora_adapters=lora or (),
        revision=revision,
        dtype=dtype,
        dry_run=dry_run,
    )
    verb = "wrote" if report.written else "would write"
    rows = [
        *report.facts.items(),
        *((f"{verb} {name}", f"{size / 1e6:,.1f} MB") for name, size in report.files.items()),
    ]
    if report.ignored:
        rows.append(("not needed", f"{len(report.ignored)} tensors, such as {report.ignored[0]}"))
    print_facts("found", report.source, [*rows, *(("note", note) for note in report.notes)])
    typer.echo(f"{verb} {report.output}")
