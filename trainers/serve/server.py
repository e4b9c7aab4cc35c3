"""A server that ends on SIGTERM when it has answered what it accepted."""

import signal
import socket
import sys
from collections.abc import Callable

import uvicorn

from trainers.evaluation.scoring.encoders import Encoder

from .app import make_app
from .service import EmbeddingService, Limits


def serve(encoder: Encoder, host: str, port: int, limits: Limits, ready: Callable[[str], None]) -> None:
    """Answer requests until SIGTERM or Control-C.

    Args:
        encoder: the model.
        host: address to listen on.
        port: 0 takes a free one.
        limits: what a request and a batch may hold.
        ready: is called with the address once requests are taken.

    Raises:
        OSError: If the address is taken.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror}") from error
    with listening:
        # Sockets that it accepts inherit this. asyncio sets it only where the listening socket names its protocol, and without it the body of an answer
        # waits 40 ms until the client acknowledges the headers.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # uvicorn stops taking requests on SIGTERM, answers those that it has, and sends itself the signal again.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        config = uvicorn.Config(make_app(EmbeddingService(encoder, limits)), log_level="warning")
        address = f"[{host}]" if ":" in host else host
        ready(f"http://{address}:{listening.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listening])
