"""What goes wrong, on demand or because the client asks for what is not there, and what is counted."""

import threading
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match: a status, or a connection that ends after some bytes of the body, or that
    stops there (`reached` is set) until `release` is.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    drop_after: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "said the stand-in"
    stall_after: int | None = None
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Request:
    """A request, the bytes of its body that arrived, and those of a file that were sent in answer."""

    method: str
    path: str
    num_bytes: int
    status: int | None
    num_bytes_sent: int = 0


class HubError(Exception):
    """An answer that is no success, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


class Dropped(Exception):
    """The connection is to be cut."""
