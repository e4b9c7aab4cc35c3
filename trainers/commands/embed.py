"""`proclip embed`: texts into a text store."""

from pathlib import Path
from typing import Annotated, Literal

import typer


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
    from ..data.text_encoding import load_encoder
    from ..data.text_files import read_texts
    from ..data.text_store import TextEmbeddingStore

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
