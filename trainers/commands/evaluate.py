"""`proclip evaluate`: measure a model on benchmarks, beside a baseline."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import ATTENTION, DEVICE, TOKEN_BUDGET


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a ProCLIP, CLIP, SigLIP or similar model.")],
    suite: Annotated[
        list[str] | None,
        typer.Option(help="A suite, a benchmark, or a YAML file of your own. Repeat for more. --list names them all."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of your own images, for retrieval. Needs --captions.")
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            help="A .csv, .tsv, .json, .jsonl or .parquet file, an image's name and a caption in every row; or the captions of COCO, Karpathy "
            "or Flickr30k."
        ),
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column of --captions with the image's name.")] = "image",
    caption_column: Annotated[
        str, typer.Option(help="Column of --captions with a caption, or a list of them.")
    ] = "caption",
    baseline: Annotated[
        str | None, typer.Option(help="Model to compare with, such as the CLIP that yours was made from.")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Another model from the same baseline, shown beside yours in the report. Repeat for more."),
    ] = None,
    output_dir: Annotated[
        Path, typer.Option(help="Gets results.json, the outcome of every item, report.html and report.json.")
    ] = Path("evaluation"),
    source: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH: local copy of a benchmark, instead of the Hub. Repeat for more."),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with local copies, named as the benchmarks.")] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Cache of embeddings, reused by later runs. Default: in the output directory.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=2, help="Draw only this many rows of every benchmark; results are marked as partial."),
    ] = None,
    device: DEVICE = None,
    model_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "stored"],
        typer.Option(
            "--model-dtype",
            "--dtype",
            help="Of the models. auto: bfloat16 where the device multiplies it natively, else float32. stored: as each part was saved.",
        ),
    ] = "float32",
    attn_implementation: ATTENTION = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 64,
    token_budget: TOKEN_BUDGET = None,
    truncate_dim: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Score only the first so many dimensions of the embeddings, beside the whole ones; meant for models trained with "
            "matryoshka_dims.",
        ),
    ] = None,
    precision: Annotated[
        Literal["float32", "int8", "binary"],
        typer.Option(help="Score images stored in 4 bytes, 1 byte or 1 bit a dimension, beside the whole ones."),
    ] = "float32",
    seed: Annotated[
        int,
        typer.Option(min=0, help="Seed of the rows that --limit draws, and of the report's intervals and examples."),
    ] = 0,
    list_all: Annotated[
        bool,
        typer.Option(
            "--list", is_eager=True, callback=lambda wanted: _print_list(wanted), help="List suites and benchmarks."
        ),
    ] = False,
) -> None:
    """Measure retrieval, zero-shot and fine-grained recognition, and what was gained or lost against a baseline.

    Data comes from the Hub or from local copies and is checked: a wrong count or column is an error. Embeddings are kept, so a stopped run
    goes on where it was. `accelerate launch -m trainers.cli evaluate ...` shares the work among GPUs. Costs one pass of each model over
    the images and texts of the suite.
    """
    from accelerate import PartialState

    from trainers.evaluation.data.manifest import check_unique, load_suite, own_images
    from trainers.evaluation.report.table import print_results
    from trainers.evaluation.runner import also_folders
    from trainers.evaluation.runner import evaluate as run
    from trainers.evaluation.scoring.encoders import Encoder
    from trainers.evaluation.scoring.stored import StoredEmbeddings

    if (images is None) != (captions is None):
        raise ValueError("--images and --captions belong together")
    manifests = [manifest for name in suite or () for manifest in load_suite(name).tasks]
    if images is not None and captions is not None:
        manifests.append(own_images(images, captions, image_column, caption_column))
    if not manifests:
        raise ValueError("nothing to evaluate on: give --suite NAME (--list names them), or --images and --captions")
    sources = {}
    for item in source or ():
        name, equals, path = item.partition("=")
        if not equals or not path:
            raise ValueError(f"--source takes NAME=PATH, got {item!r}")
        sources[name] = path
    state = PartialState(cpu=device == "cpu")
    place = state.device if device in (None, "cuda") else device
    if also and baseline is None:
        raise ValueError("--also needs --baseline: the models are compared with it")
    names = [model, *([] if baseline is None else [baseline]), *(also or [])]
    encoders = [Encoder.load(name, place, model_dtype, attn_implementation) for name in names]
    called = [encoder.name for encoder in encoders]
    for encoder, given in zip(encoders, names, strict=True):
        if (
            len(encoders) > 2 and called.count(encoder.name) > 1
        ):  # folders of one name: by the paths as they were given
            encoder.name = given
    results = run(
        encoders,
        check_unique(manifests),
        output_dir,
        sources=sources,
        data_dir=data_dir,
        cache_dir=cache_dir,
        limit=limit,
        batch_size=batch_size,
        token_budget=token_budget,
        seed=seed,
        stored=StoredEmbeddings(truncate_dim, precision),
    )
    if state.is_main_process:
        print_results(results[0], results[1] if baseline is not None else None)
        typer.echo(f"results: {output_dir / 'results.json'}")
        others = also_folders(output_dir, [encoder.name for encoder in encoders[2:]])
        _write_report(output_dir, [output_dir, *others], output_dir / "baseline" if baseline else None)


def _write_report(output_dir: Path, models: list[Path], baseline: Path | None) -> None:
    """Writes the report, prints its verdicts and says where it is; without matplotlib, how to get one."""
    from trainers.evaluation.report import write_report

    try:
        page = write_report(output_dir, models, baseline)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        typer.echo('No report: its plots need matplotlib; pip install "proclip-transformers[evaluation]"')
        return
    report = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    for entry in report["models"]:
        if entry["verdict"]:
            typer.echo(f"Did I break CLIP? {entry['name']}: {entry['verdict']['headline']}")
    typer.echo(f"report: {page}")


def _print_list(wanted: bool) -> None:
    if wanted:
        from trainers.evaluation.data.manifest import load_manifest, load_suite, manifest_names, suite_names

        typer.echo("suites")
        for name in suite_names():
            typer.echo(f"  {name:20} {load_suite(name).title}")
        typer.echo("benchmarks")
        for name in manifest_names():
            typer.echo(f"  {name:20} {load_manifest(name)[0].title}")
        raise typer.Exit()
