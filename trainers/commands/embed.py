"""`proclip embed`: embed texts into a text store, or verify a store."""

import operator
import os
from typing import Annotated, Any, Literal

import typer

from .options import ATTENTION, DEVICE, TOKEN_BUDGET


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
            help="Compile the LLM's layers: some seconds once, then faster. By default on a GPU, for 100,000 texts and more."
        ),
    ] = None,
    process_index: Annotated[
        int | None,
        typer.Option(min=0, help="Index of this process among those that fill the store. Default: from the launcher."),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="Number of processes that fill the store. Default: from the launcher.")
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

    Several processes can fill one store: under `accelerate launch` or `torchrun`, or each with its own --process-index.
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

    from trainers.compute import compiled
    from trainers.data.text_files import read_texts
    from trainers.text_store.encoding import load_encoder, text_dtype
    from trainers.text_store.store import TextEmbeddingStore

    # accelerate and torchrun tell each process which one it is.
    if process_index is None:
        process_index = int(os.environ.get("RANK", 0))
    if num_processes is None:
        num_processes = int(os.environ.get("WORLD_SIZE", 1))
    source = read_texts(texts, column, split)
    encoder, processor = load_encoder(model, device or _device_of_process(), model_dtype, attn_implementation)
    if compile_layers is None:
        compile_layers = encoder.device.type == "cuda" and operator.length_hint(source) >= compiled.WORTH_COMPILING
    if compile_layers:
        compiled.compile_layers(encoder)
    store = TextEmbeddingStore.build(
        source,
        encoder,
        processor,
        output,
        token_budget=token_budget,
        shard_size=shard_size,
        dtype=dtype,
        progress=process_index == 0,
        process_index=process_index,
        num_processes=num_processes,
    )
    summary = store.build_summary
    share = f"process {process_index} of {num_processes}: " if num_processes > 1 else ""
    typer.echo(
        f"{share}{summary.num_texts:,} texts: {summary.num_new:,} embedded, {summary.num_stored:,} in the store before, "
        f"{summary.num_repeated:,} repeated, {summary.num_truncated:,} cut to {store.fingerprint['max_length']} tokens"
    )
    typer.echo(f"{share}{summary.seconds:.1f} seconds, {summary.num_new / summary.seconds:,.1f} texts/s")
    typer.echo(
        f"{share}{output}: {len(store):,} embeddings of {store.dim} {dtype}, {store.num_bytes / 1e6:,.1f} MB on disk; the model ran in "
        f"{str(text_dtype(encoder)).removeprefix('torch.')}"
    )


def _device_of_process() -> str | None:
    """The GPU of this process where a launcher has started one for each; None: as ever."""
    import torch

    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return None


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
