"""A stand-in for the Hugging Face Hub on loopback, for the real client: repositories, commits, large files, downloads, and faults on demand.

It speaks what `huggingface_hub` asks of the Hub when it creates, fills, reads and deletes model and dataset repositories, and counts the
bytes it is sent. Large files travel by the Git LFS protocol (one PUT a file, or parts), not by Xet, which has no server to run on
loopback: clients are started with `HF_HUB_DISABLE_XET=1`. See [`HubServer.environment`].
"""

from .connection import READ_TOKEN, TOKEN
from .server import HubServer, hub_server


__all__ = ["READ_TOKEN", "TOKEN", "HubServer", "hub_server"]
