"""`proclip embed`: embed texts into a text store, or verify a store."""

import glob
import operator
import os
from functools import partial
from typing import Annotated, Any, Literal

import typer

from .options import ATTENTION, DEVICE, TOKEN_BUDGET


_SEVERAL = "Several processes"  # heads their options in the help


def embed(
    texts: Annotated[
        str | None,
        typer.Argument(
            help="Texts (.txt, one a line), a table (.csv, .tsv, .jsonl, .json, .parquet), a captions file of COCO, Karpathy or Flickr30k, "
            "webdataset shards (.tar), a folder or pattern of these, an address of these in an object store (s3://, gs://, hf://), or a "
            "dataset's name on the Hub."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub name of a ProCLIP checkpoint, or of a CLIP or SigLIP.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Directory of the text store. An existing one gets the texts that it lacks.")
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            help="Column with a text, or a list of texts, in every row; json.caption reaches into an object. By default text, else caption."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split of a dataset, folder or captions file that has several.")
    ] = "train",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="dtype of the stored embeddings.")
    ] = "float32",
    token_budget: TOKEN_BUDGET = None,
    shard_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Texts in a shard, which is also the most that a killed run loses. Use 65536 for tens of millions of texts.",
        ),
    ] = 8192,
    device: DEVICE = None,
    model_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "stored"],
        typer.Option(help="Of the model. auto: bfloat16 where the device multiplies it natively, else float32."),
    ] = "stored",
    attn_implementation: ATTENTION = None,
    compile_layers: Annotated[
        bool | None,
        typer.Option(
            help="Compile the LLM's layers: some seconds once, then faster. By default on a GPU, for 100,000 texts and more, and for tasks."
        ),
    ] = None,
    num_tasks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Divide TEXTS into this many tasks, which processes take until all are done. Some tens for each device. With --engine ray: 100.",
            rich_help_panel=_SEVERAL,
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(
            help="ray: a worker for each device takes tasks, on the cluster that RAY_ADDRESS names, or else on this machine.",
            rich_help_panel=_SEVERAL,
        ),
    ] = "local",
    num_workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Workers of --engine ray. Default: one for each GPU, or one for each machine if there is none.",
            rich_help_panel=_SEVERAL,
        ),
    ] = None,
    process_index: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Without tasks: index of this process. Default: from the launcher.",
            rich_help_panel=_SEVERAL,
        ),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Without tasks: number of processes. Default: from the launcher.",
            rich_help_panel=_SEVERAL,
        ),
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(
            help="Verify this store, or the one at an address, and embed nothing: checksums, keys, index, numbers. With TEXTS and --model also embed a sample again."
        ),
    ] = None,
) -> None:
    """Embed texts once with a frozen text model, into a store that training looks them up in.

    A ProCLIP checkpoint gives the pooled embeddings of its LLM, before the adapter; a CLIP gives its projected text embeddings, which teach
    stage 1. To resume a stopped run, give the same command again. Costs one forward pass for each text, and disk space of one embedding
    for each text.

    **Several processes** fill one store. With --num-tasks, each process reads only the tasks that it takes. Start any number of them with the same
    command, at any time, on any machine that shares the output directory; the tasks of processes that died are done by the others. Without it,
    every process reads all texts and embeds its share: under `accelerate launch`, `torchrun` or `srun`, or each with its own --process-index.
    """
    if verify is not None:
        if output is not None:
            raise typer.BadParameter("--verify names the store: leave --output out")
        if (texts is None) != (model is None):
            raise typer.BadParameter("to embed a sample again, --verify needs both TEXTS and --model")
        return _verify(verify, texts, model, column, split, device, model_dtype, attn_implementation)
    if texts is None or model is None or output is None:
        missing = {"TEXTS": texts, "--model": model, "--output": output}
        raise typer.BadParameter(f"{', '.join(name for name, value in missing.items() if value is None)} is missing")
    if (process_index is None) != (num_processes is None):
        raise typer.BadParameter("--process-index and --num-processes go together: give both or neither")
    if process_index is not None and (num_tasks is not None or engine == "ray"):
        raise typer.BadParameter("tasks go to whoever is free: leave --process-index and --num-processes out")
    if engine == "local" and num_workers is not None:
        raise typer.BadParameter("--num-workers is of --engine ray: without it, start the command several times")

    from trainers.compute.launcher import LaunchedProcess, launched_process
    from trainers.data.text_files import divide_texts, read_texts
    from trainers.text_store.store import TextEmbeddingStore

    if process_index is not None and num_processes is not None:
        process = LaunchedProcess(process_index, num_processes)
    else:
        process = launched_process()
    options: dict[str, Any] = {"token_budget": token_budget, "shard_size": shard_size, "dtype": dtype}
    load = partial(
        _load_encoder, _absolute(model), device, process.local_index, model_dtype, attn_implementation, compile_layers
    )
    if engine == "ray":
        from trainers.text_store.ray_workers import build_with_ray

        divided = divide_texts(_absolute(texts), column, split)
        load = partial(load, None)
        store = build_with_ray(divided, load, output, num_tasks=num_tasks or 100, num_workers=num_workers, **options)
        return _tell(store, output, "all workers: ")
    options["progress"] = process.index == 0
    if num_tasks is not None:
        divided = divide_texts(texts, column, split)
        store = TextEmbeddingStore.build(divided, *load(None), output, num_tasks=num_tasks, **options)
        return _tell(store, output, "this process: ")
    source = read_texts(texts, column, split)
    options |= {"process_index": process.index, "num_processes": process.count}
    store = TextEmbeddingStore.build(source, *load(operator.length_hint(source)), output, **options)
    _tell(store, output, f"process {process.index} of {process.count}: " if process.count > 1 else "")


def _absolute(name: str) -> str:
    """The same file, folder or pattern of files for processes that run in other directories; what is elsewhere as it is."""
    return os.path.abspath(name) if os.path.exists(name) or glob.glob(name) else name


def _load_encoder(
    model: str,
    device: str | None,
    local_index: int | None,
    model_dtype: Any,
    attn_implementation: str | None,
    compile_layers: bool | None,
    num_texts: int | None,
) -> tuple[Any, Any]:
    """The encoder and its processor, on the GPU of this process where a launcher has started one process for each."""
    import torch

    from trainers.compute import compiled
    from trainers.text_store.encoding import load_encoder

    if device is None and local_index is not None and torch.cuda.is_available():
        device = f"cuda:{local_index % torch.cuda.device_count()}"
    encoder, processor = load_encoder(model, device, model_dtype, attn_implementation)
    if compile_layers is None:
        compile_layers = encoder.device.type == "cuda" and (num_texts is None or num_texts >= compiled.WORTH_COMPILING)
    if compile_layers:
        compiled.compile_layers(encoder)
    return encoder, processor


def _tell(store: Any, output: str, who: str) -> None:
    """Print what was done: by this process, or by all tasks."""
    summary = store.build_summary
    done = f"{summary.num_tasks:,} tasks, " if summary.num_tasks else ""
    typer.echo(
        f"{who}{done}{summary.num_texts:,} texts: {summary.num_new:,} embedded, {summary.num_stored:,} in the store before, "
        f"{summary.num_repeated:,} repeated, {summary.num_truncated:,} cut to {store.fingerprint['max_length']} tokens"
    )
    if summary.seconds:
        unit = "seconds over all tasks" if summary.num_tasks else "seconds"
        typer.echo(f"{who}{summary.seconds:.1f} {unit}, {summary.num_new / summary.seconds:,.1f} texts/s")
    typer.echo(
        f"{who}{output}: {len(store):,} embeddings of {store.dim} {str(store.dtype).removeprefix('torch.')}, {store.num_bytes / 1e6:,.1f} MB on "
        f"disk; the model ran in {store.fingerprint.get('model_dtype', 'an unknown dtype')}"
    )


def _verify(store: str, texts: str | None, model: str | None, column: str | None, split: str, *settings: Any) -> None:
    from trainers.data.text_files import read_texts
    from trainers.text_store.encoding import load_encoder
    from trainers.text_store.verify import verify_store

    source, encoder, processor = None, None, None
    if texts is not None and model is not None:
        source = read_texts(texts, column, split)
        encoder, processor = load_encoder(model, *settings)
    found = verify_store(store, source, encoder, processor)
    compared = ""
    if found.smallest_cosine is not None:
        compared = f", {found.num_compared:,} embedded again (smallest cosine {found.smallest_cosine:.5f})"
    typer.echo(f"{store}: {found.num_texts:,} texts in {found.num_shards:,} sound shards{compared}")
    for problem in found.problems:
        typer.echo(f"error: {problem}", err=True)
    if found.problems:
        raise typer.Exit(1)
