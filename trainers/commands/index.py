"""`proclip index`: index a folder of images for `proclip search`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import DEVICE


_SHOWN = 20  # unreadable files that are named without --list-unreadable


def index(
    folder: Annotated[Path, typer.Argument(help="Folder of images, with its subfolders. Links are not followed.")],
    output: Annotated[Path, typer.Option(help="Folder of the index. An existing one is updated.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub name of a ProCLIP checkpoint, or of a CLIP or SigLIP. Default: the one that made the index."
        ),
    ] = None,
    truncate_dim: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep only the first so many dimensions of the embeddings; meant for models trained with matryoshka_dims. Default: those of "
            "the index, and all in a new one.",
        ),
    ] = None,
    precision: Annotated[
        Literal["float32", "int8", "binary"] | None,
        typer.Option(
            help="Of the stored embeddings: 4 bytes, 1 byte or 1 bit a dimension. Default: that of the index, and float32 in a new one."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 32,
    device: DEVICE = None,
    export: Annotated[
        Path | None,
        typer.Option(
            help="Also write paths, dates, captions and embeddings to this parquet file, for a vector database."
        ),
    ] = None,
    list_unreadable: Annotated[
        bool, typer.Option("--list-unreadable", help="Name every file that no image could be read from.")
    ] = False,
) -> None:
    """Index a folder of images for `proclip search`.

    A second run embeds only what is new or has changed, and notices files that were moved, copied or deleted. A stopped run keeps what it
    has done. Costs one forward pass of the image encoder for each image, and about 12 kB an image on disk.

    A text in UTF-8 beside an image (`photo.txt` beside `photo.jpg`) is its caption.
    """
    from trainers.search.build import index_folder
    from trainers.search.encoder import load_encoder
    from trainers.search.export import export_index
    from trainers.search.folder import Folder, printable

    Folder(folder)  # refused before the model is loaded
    encoder, name = load_encoder(output, model, device)
    images, summary = index_folder(
        output, folder, name, encoder, batch_size, progress=True, truncate_dim=truncate_dim, precision=precision
    )
    counts = {
        "embedded": summary.embedded,
        "moved or copied": summary.reused,
        "unchanged": summary.unchanged,
        "removed": summary.removed,
        "duplicates": summary.duplicates,
        "unreadable files": len(summary.unreadable),
        "links not followed": summary.num_links,
    }
    parts = [f"{name}: {count:,}" for name, count in counts.items() if count]
    typer.echo(f"{output}: {summary.total:,} images" + (f"; {', '.join(parts)}" if parts else ""))
    shown = summary.unreadable if list_unreadable else summary.unreadable[:_SHOWN]
    for path, reason in shown:
        typer.echo(f"  unreadable: {printable(path)}: {printable(reason)}")
    if len(shown) < len(summary.unreadable):
        typer.echo(f"  and {len(summary.unreadable) - len(shown):,} more: --list-unreadable names them all")
    if export is not None:
        export_index(images, export)
        typer.echo(f"{export}: {len(images):,} rows")
