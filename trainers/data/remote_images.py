"""Images at addresses on the web, which are fetched only where the user has asked for it: one request each, of limited size and time."""

import http.client
import time
import urllib.error
import urllib.request
from typing import Any


_SECONDS = 20.0
_MOST_BYTES = 64 << 20
_BLOCK = 1 << 16


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows at most five redirections, to http and https only."""

    max_redirections = 5

    def redirect_request(self, request: Any, file: Any, code: int, message: str, headers: Any, address: str) -> Any:
        if not address.lower().startswith(("http://", "https://")):
            raise ValueError(f"it is redirected to {address!r:.100}, and only http and https are followed")
        return super().redirect_request(request, file, code, message, headers, address)


# Without the handlers of file:, ftp: and data:, which urllib's own opener has.
_OPENER = urllib.request.OpenerDirector()
for _handler in (
    urllib.request.ProxyHandler(),
    urllib.request.HTTPHandler(),
    urllib.request.HTTPSHandler(),
    urllib.request.HTTPDefaultErrorHandler(),
    urllib.request.HTTPErrorProcessor(),
    _Redirects(),
):
    _OPENER.add_handler(_handler)


def fetch_image(address: str) -> bytes:
    """What is at `address`, fetched by one request. OSError if it cannot be had within 20 seconds, ValueError if it has more than 64 MiB."""
    deadline, parts, size = time.monotonic() + _SECONDS, list[bytes](), 0
    request = urllib.request.Request(address, headers={"User-Agent": "proclip-transformers"})
    try:
        with _OPENER.open(request, timeout=_SECONDS) as response:
            while block := response.read1(_BLOCK):
                parts.append(block)
                size += len(block)
                if size > _MOST_BYTES:
                    raise ValueError(f"{address!r:.200} has more than {_MOST_BYTES >> 20} MiB")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{address!r:.200} takes more than {_SECONDS:.0f} seconds")
            if response.length:
                raise OSError(f"{address!r:.200} ended {response.length:,} bytes too early")
            return b"".join(parts)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
        raise OSError(f"{address!r:.200} could not be fetched: {error}") from error
