"""Processes that train together on this machine, for tests."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.multiprocessing as mp


def run_processes(
    function: Callable[..., None], world_size: int, *args: Any, preload: Sequence[str] = (), **variables: str
) -> None:
    """Call `function(rank, world_size, *args)` in as many processes as `world_size` says, each with the variables that a launcher sets and with `variables`.
    Returns when all have ended. An error in one of them ends the others and is raised.

    Args:
        preload: modules that are slow to import, besides that of `function`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # From a server that has imported everything once: that takes longer than all the training.
    multiprocessing.set_forkserver_preload([function.__module__, *preload])
    mp.start_processes(_start, (function, world_size, port, variables, args), world_size, start_method="forkserver")


def _start(
    rank: int,
    function: Callable[..., None],
    world_size: int,
    port: int,
    variables: dict[str, str],
    args: Sequence[Any],
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **variables,
    }
    function(rank, world_size, *args)
