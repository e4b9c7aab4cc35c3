"""`proclip serve`: embeddings over HTTP."""

from typing import Annotated, Literal

import typer

from .options import ATTENTION, DEVICE


def serve(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a ProCLIP, CLIP or SigLIP.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 lets other computers in: there is no password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens in a batch that requests share; an image counts as 256.")
    ] = 16_384,
    max_inputs: Annotated[int, typer.Option(min=1, help="Most texts and images in a request.")] = 256,
    max_body_mb: Annotated[int, typer.Option("--max-body-mb", min=1, help="Largest request, in MB.")] = 32,
    device: DEVICE = None,
    model_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "stored"],
        typer.Option(help="auto: bfloat16 where the device multiplies it natively, else float32."),
    ] = "auto",
    attn_implementation: ATTENTION = None,
) -> None:
    """Serve embeddings of texts and images over HTTP, as OpenAI's `/v1/embeddings`.

    An image is a data URL in place of a text; nothing is fetched. Requests that come while the model computes share the next batch. `/health`
    and `/metrics` (Prometheus) are for whoever watches. On SIGTERM the server answers what it has accepted, and ends.
    """
    from trainers.compute.dtypes import default_device
    from trainers.evaluation.scoring.encoders import Encoder
    from trainers.serve.server import serve as run
    from trainers.serve.service import Limits

    encoder = Encoder.load(model, device or default_device(), model_dtype, attn_implementation)
    limits = Limits(inputs=max_inputs, body_bytes=max_body_mb << 20, batch_tokens=batch_tokens)
    run(encoder, host, port, limits, lambda address: typer.echo(f"serving {encoder.name} on {address}"))
