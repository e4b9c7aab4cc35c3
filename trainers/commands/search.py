"""`proclip search`: find images of an index by text, by image, or by both."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import DEVICE


def search(
    index: Annotated[Path, typer.Argument(help="Folder of the index, made by `proclip index`.")],
    query: Annotated[
        str | None, typer.Argument(help="What the images show, in any language and length that the model reads.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image to find similar ones of. With QUERY, both count.")] = None,
    image_weight: Annotated[float, typer.Option(min=0, max=1, help="Weight of --image beside QUERY.")] = 0.5,
    negative: Annotated[str | None, typer.Option("--not", help="What the images do not show.")] = None,
    words: Annotated[
        str | None,
        typer.Option(help="Also search captions and file names for these words; the two rankings are merged."),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            help="SQL condition on path, size (bytes), width, height (pixels), taken and caption, such as \"taken >= '2025-01-01'\"."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of images to print.")] = 12,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare with every embedding, even if there is an approximate index.")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say how the index was searched.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help='Print a list of {"path": ..., "score": ...}.')] = False,
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub name of the model that made the index, if it has moved.")
    ] = None,
    device: DEVICE = None,
) -> None:
    """Search an index of images by text, by image, or by both.

    Prints the best first: its score (cosine; with --words the merged reciprocal ranks) and its path in the indexed folder. Costs loading the
    model, one forward pass of its text encoder, and milliseconds.
    """
    from trainers.search.build import check_model
    from trainers.search.encoder import load_encoder
    from trainers.search.folder import printable
    from trainers.search.query import Question, describe
    from trainers.search.query import search as run
    from trainers.search.table import ImageIndex

    question = Question(query, image, negative, image_weight)
    images = ImageIndex(index)
    encoder, _ = load_encoder(index, model, device)
    check_model(images, encoder)
    cut = encoder.count_truncated([text for text in (query, negative) if text])
    if cut:
        typer.echo("note: the model does not read the text to its end", err=True)
    results = run(images, question.embedding(encoder, images.dim), top, where, words, exact=exact)
    if explain:
        typer.echo(describe(images, exact), err=True)
    if as_json:
        typer.echo(
            json.dumps([{"path": row["path"], "score": row["score"]} for row in results], ensure_ascii=False, indent=1)
        )
        return
    for row in results:
        typer.echo(f"{row['score']:7.4f}  {printable(row['path'])}")
    if not results:
        typer.echo(f"no image of {index} meets the conditions" if where else f"{index} has no images", err=True)
