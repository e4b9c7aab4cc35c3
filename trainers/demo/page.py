"""The page itself, in Gradio: a box for a text, a place for an image, and the answers. It is served to this computer and asks nothing of any other."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answer import Answer, ask, render
from .gallery import Gallery, Indexing


MAX_CHARACTERS = 20_000
MAX_IMAGE = "50mb"
_STYLE = Path(__file__).parent / "templates" / "page.css"
_HELP = "Type what the images show, in any language the model reads, or drop an image. Both together count half each."
# Gradio fetches addresses for whoever asks; the page needs none.
_FETCHES = re.compile(r"/(file=|proxy=|stream=)https?:", re.IGNORECASE)
# Gradio's script builds functions from text, and its pages and styles are inline.
_POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'; form-action 'self'"


class OnlyHere:
    """ASGI middleware: the page may load from its own server only, and the server fetches nothing for it."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses what would be fetched, and adds the policy to every answer."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        if scope["type"] == "http" and _FETCHES.search(scope["path"]):
            await PlainTextResponse("this page fetches nothing", status_code=403)(scope, receive, send)
        else:
            await self.app(scope, receive, send_with_policy)


def build_page(galleries: Sequence[Gallery], indexing: Indexing, top: int, examples: Sequence[str]) -> gradio.Blocks:
    """The page, not served yet. Arguments as for [`serve`]."""

    def answer(text: str | None, dropped: dict[str, Any] | None) -> str:
        text, image = (text or "").strip(), None if dropped is None else Path(dropped["path"])
        if len(text) > MAX_CHARACTERS:
            return render(
                [Answer("Too long", message=f"Texts of up to {MAX_CHARACTERS:,} characters are searched for.")]
            )
        if not text and image is None:
            return render([Answer("Nothing to search for", message=_HELP)])
        return render([ask(gallery, text, image, top) for gallery in galleries])

    def status() -> tuple[str, gradio.Timer]:
        return indexing.status, gradio.Timer(active=indexing.running)

    # Files that people drop are deleted after an hour.
    with gradio.Blocks(title="Search images", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gradio.Markdown(f"# Search images\n{_HELP}")
        with gradio.Row():
            with gradio.Column(scale=3, min_width=280):
                text = gradio.Textbox(
                    label="Text", placeholder=examples[0] if examples else None, lines=1, max_lines=8, autofocus=True,
                    max_length=MAX_CHARACTERS, elem_id="text",
                )  # fmt: skip
                search = gradio.Button("Search", variant="primary", elem_id="search")
            with gradio.Column(scale=1, min_width=200):
                image = gradio.Image(
                    label="Image", sources=["upload", "clipboard"], height=180, buttons=[], elem_id="image"
                )  # fmt: skip
        if examples:
            gradio.Examples([[example] for example in examples], inputs=[text], label="Such as")
        # Read by screen readers when it changes, as the answers are.
        state = gradio.Markdown(elem_id="status")
        answers = gradio.HTML(elem_id="answers")
        # Without Gradio's preprocessing the image comes as the uploaded file, which our own decoder reads: it says what is wrong with it.
        gradio.on(
            [text.submit, search.click, image.upload, image.clear], answer, inputs=[text, image], outputs=answers,
            preprocess=False, api_visibility="private",
        )  # fmt: skip
        timer = gradio.Timer(1)
        gradio.on(
            [page.load, timer.tick], status, outputs=[state, timer], show_progress="hidden", api_visibility="private"
        )
    return page


def serve(
    galleries: Sequence[Gallery],
    host: str = "127.0.0.1",
    port: int | None = None,
    top: int = 12,
    examples: Sequence[str] = (),
    announce: Callable[[str], object] | None = None,
) -> str:
    """Serve the page of `galleries`, and bring those that have a folder up to date meanwhile.

    Args:
        galleries: shown side by side.
        host: address to listen on. Whoever reaches it can search, and sees thumbnails and paths.
        port: by default the first free one from 7860 on.
        top: images in an answer.
        examples: texts to try.
        announce: called with the page's address; then the call waits for Control-C. Without it the call returns, and the page is served as
            long as the process lives.

    Returns:
        The page's address.

    Raises:
        OSError: If the port is taken, or `host` is not an address of this computer.
    """
    indexing = Indexing(list(galleries))
    page = build_page(galleries, indexing, top, examples)
    indexing.start()
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            share=False,
            quiet=True,
            footer_links=[],
            ssr_mode=False,
            max_file_size=MAX_IMAGE,
            enable_monitoring=False,
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css_paths=_STYLE,
            app_kwargs={"middleware": [Middleware(OnlyHere)]},
        )
    except OSError as error:  # Gradio's message names its own settings
        place = f"port {port}" if port is not None else "any port from 7860 to 7959"
        raise OSError(
            f"cannot listen on {host}, {place}: another program does, or {host} is not an address of this computer; name another --port or --host"
        ) from error
    if announce is not None:
        announce(f"open {address}  (Control-C ends it)")
        page.block_thread()
    return address
