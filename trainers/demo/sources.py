"""What `proclip demo` shows: an index, a folder of images, or the quickstart's images."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from trainers.openmoji.images import render
from trainers.openmoji.task import SIZES, Task, make_task
from trainers.search.build import check_model
from trainers.search.encoder import load_encoder
from trainers.search.folder import Folder
from trainers.search.table import SETTINGS_FILE, ImageIndex
from trainers.storage.folders import replacing_folder

from .gallery import Gallery


QUICKSTART = Path("quickstart-output")
# A text that a CLIP with few tokens cuts before it comes to the point.
_LONG = "a drawing and not a photograph, with clear outlines and few colours, as one would find it in a message between friends: {}"


def gallery_of(source: Path, model: str | None = None, device: str | None = None) -> Gallery:
    """The gallery of an index, or of a folder of images, whose index is `FOLDER.index` where the command runs.

    Args:
        source: the index or the folder.
        model: folder or Hub name of the model; by default the one that made the index.
        device: such as "cpu" or "cuda:1"; by default the GPU if there is one.

    Raises:
        NotADirectoryError: If there is no such folder.
        ValueError: If the model is not the one that made the index, or the index is new and no model is given.
    """
    if (source / SETTINGS_FILE).exists():
        path, folder = source, None
    else:
        folder = Folder(source).root.resolve()
        path = Path(f"{folder.name}.index")
    encoder, name = load_encoder(path, model, device)
    if folder is None:
        check_model(ImageIndex(path), encoder)
    return Gallery(encoder.name, path, encoder, name, folder)


def side_by_side(gallery: Gallery, other: Path, device: str | None = None) -> list[Gallery]:
    """`gallery` and the gallery of the index `other`; ValueError if that is of other images."""
    compared = gallery_of(other, device=device)
    folders = [gallery.folder or ImageIndex(gallery.path).folder, ImageIndex(other).folder]
    if folders[0] != folders[1]:
        raise ValueError(
            f"{other} is an index of {folders[1]} and not of {folders[0]}: make one by `proclip index {folders[0]} --model MODEL`"
        )
    return [gallery, compared]


def quickstart_galleries(output: Path = QUICKSTART, device: str | None = None) -> tuple[list[Gallery], list[str]]:
    """The galleries of the quickstart's ProCLIP and of its CLIP, and texts to try.

    Args:
        output: what `proclip quickstart` wrote. Gets the images and their indexes, once.
        device: as for [`gallery_of`].

    Raises:
        FileNotFoundError: If the quickstart has not run.
    """
    try:
        results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there is no {output}/results.json: run `proclip quickstart` first, or name an index or a folder of images"
        ) from error
    task = make_task(SIZES[results["size"]], results["seed"])
    images = (output / f"images-{results['size']}-{results['seed']}").resolve()
    if not images.is_dir():
        write_images(task, images)
    models = {"ProCLIP": output / "proclip", "CLIP": Path(str(files("trainers.quickstart") / "assets" / "emoji-clip"))}
    galleries = []
    for title, model in models.items():
        # Another run of the quickstart makes another model, and so another index.
        encoder, name = load_encoder(output, str(model), device)
        path = output / f"{images.name}-{encoder.weights_sha256[:12]}.index"
        galleries.append(Gallery(title, path, encoder, name, images))
    captions = [task.retrieval[query].long for query in task.example_queries]
    return galleries, [*captions[:3], _LONG.format(captions[3])]


def write_images(task: Task, folder: Path) -> None:
    """Writes the images that the quickstart retrieves, each with its caption beside it, to the new folder `folder`."""
    with replacing_folder(folder) as partial:
        for number, image in enumerate(task.retrieval):
            concept: Any = task.concepts[image.concept]
            file = partial / f"{number:04} {concept.name}.png"
            render(concept, image.view, side=224).save(file)
            file.with_suffix(".txt").write_text(image.long + "\n", encoding="utf-8")
