"""The same few pictures with captions in every layout that people have."""

import csv
import io
import json
import tarfile
from pathlib import Path

import datasets
from PIL import Image

from trainers.data import PairSource


def color(number: int) -> tuple[int, int, int]:
    return (number % 256, 7 * number % 256, 255 - number % 256)


def picture(number: int) -> Image.Image:
    """A picture that tells its number: all pixels have the colour `color(number)`."""
    return Image.new("RGB", (4, 3), color(number))


def picture_bytes(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(number).save(file, kind)
    return file.getvalue()


def captions(number: int) -> list[str]:
    return [f"caption {number}", f"a longer caption of picture {number}"]


def write_webdataset(folder: Path, sizes: list[int], broken: dict[int, bytes] | None = None) -> list[Path]:
    """Shards of `sizes` rows: .png with .json; the file of a row in `broken` holds these bytes instead."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, number = [], 0
    for shard, size in enumerate(sizes):
        paths.append(folder / f"{shard:03d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for _ in range(size):
                data = (broken or {}).get(number, picture_bytes(number))
                texts = json.dumps({"number": number, "captions": captions(number)}).encode()
                for name, content in ((f"{number:05d}.png", data), (f"{number:05d}.json", texts)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1
    return paths


def write_layout(folder: Path, layout: str, count: int = 6) -> PairSource:
    """`count` pictures with captions as `layout`, and the source that reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "webdataset":
        write_webdataset(folder, [count // 2, count - count // 2])
        return PairSource(source=str(folder / "*.tar"), image_column=["jpg", "png"], text_columns="json.captions")
    if layout == "parquet":
        rows = [{"picture": picture(i), "texts": captions(i)} for i in range(count)]
        datasets.Dataset.from_list(rows).cast_column("picture", datasets.Image()).to_parquet(folder / "a.parquet")
        return PairSource(source=str(folder / "a.parquet"), image_column="picture", text_columns="texts")
    if layout == "saved":
        rows = [{"image": picture(i), "text": captions(i)} for i in range(count)]
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(folder)
        return PairSource(source=str(folder))
    for i in range(count):
        picture(i).save(folder / f"{i}.png")
    names = [f"{i}.png" for i in range(count)]
    if layout == "imagefolder":
        lines = [json.dumps({"file_name": name, "text": captions(i)}) for i, name in enumerate(names)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        return PairSource(source=str(folder))
    if layout == "beside":
        for i in range(count):
            (folder / f"{i}.txt").write_text("\n".join(captions(i)) + "\n\n")
        return PairSource(source=str(folder))
    if layout == "jsonl":
        lines = [json.dumps({"path": name, "text": captions(i)}) for i, name in enumerate(names)]
        (folder / "pairs.jsonl").write_text("\n".join(lines))
        return PairSource(source=str(folder / "pairs.jsonl"), image_column="path")
    if layout == "csv":
        with open(folder / "pairs.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "short", "long"])
            writer.writerows([name, *captions(i)] for i, name in enumerate(names))
        return PairSource(source=str(folder / "pairs.csv"), image_column="path", text_columns=["short", "long"])
    raise ValueError(layout)


LAYOUTS = ["webdataset", "parquet", "saved", "imagefolder", "beside", "jsonl", "csv"]
