"""MkDocs hook: a page that loads something from another host is an error, as the site has to work without a network."""

import logging
import re
from typing import Any


log = logging.getLogger("mkdocs.hooks.offline")
LOADED = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["']?(https?:[^"' >]+)""")


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Warn, which `strict` makes an error, of every address of another host that the page loads by itself."""
    for address in LOADED.findall(output):
        log.warning(f"{page.file.src_uri}: loads {address}")
    return output
