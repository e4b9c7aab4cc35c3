"""`proclip demo`: a page in the browser that searches images."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="Index made by `proclip index`, or a folder of images, whose index FOLDER.index is made or updated here. Default: the "
            "images of quickstart-output/."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub name of a ProCLIP checkpoint, or of a CLIP or SigLIP. Default: the one that made the index."
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(help="Index of the same images by another model, such as a plain CLIP, to show beside it."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=200, help="Number of images to show.")] = 12,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any other than this one lets other computers search.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 on.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1. Default: the GPU if there is one.")
    ] = None,
) -> None:
    """Search images on a page in the browser, by a text of any length, an image, or both.

    Shows where a model cuts the text. The page can be used while a folder is being indexed. It is served to this computer only, gives out
    thumbnails and paths but no file, and asks nothing of any other computer. Control-C ends it.
    """
    from trainers.demo.page import serve
    from trainers.demo.sources import gallery_of, quickstart_galleries, side_by_side

    examples: list[str] = []
    if source is None:
        if model is not None or compare is not None:
            raise ValueError("--model and --compare need an index or a folder of images to go with")
        galleries, examples = quickstart_galleries(device=device)
    else:
        galleries = [gallery_of(source, model, device)]
        if compare is not None:
            galleries = side_by_side(galleries[0], compare, device)
    for gallery in galleries:
        if gallery.folder is not None:
            typer.echo(f"{gallery.path}: index of {gallery.folder}")
    serve(galleries, host, port, top, examples, announce=typer.echo)
