"""The page in a real browser: type, drop, click, a narrow window; and what its server gives out."""

import base64
import json
import re
import socket
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import gradio
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.headless_browser import find_browser
from tests.trainers.demo.conftest import LONG
from trainers.demo.page import serve


expect.set_options(timeout=60_000)  # a busy machine is no error


@pytest.fixture(scope="module")
def address(galleries):
    yield serve(galleries, top=5, examples=["a blue boat", LONG]).rstrip("/")
    gradio.close_all()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])


class Visit:
    """A page that is open, with what it asked for and complained of."""

    def __init__(self, browser, address: str, **options):
        self.page: Page = browser.new_context(**options).new_page()
        self.page.set_default_timeout(60_000)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.goto(address)
        expect(self.page.locator("#status")).to_contain_text("CLIP: 10 images, 1 unreadable files", timeout=60_000)

    def drop(self, name: str, data: bytes) -> None:
        """Lets go of a file above the place for an image."""
        transfer = self.page.evaluate_handle(
            """([name, data]) => {
                const transfer = new DataTransfer();
                const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
                transfer.items.add(new File([bytes], name, {type: "image/jpeg"}));
                return transfer;
            }""",
            [name, base64.b64encode(data).decode()],
        )
        self.page.locator("#image button").first.dispatch_event("drop", {"dataTransfer": transfer})

    def paths(self, section: int = 0) -> list[str]:
        return self.page.locator(".answers section").nth(section).locator(".path").all_inner_texts()


@pytest.fixture
def visit(browser, address):
    visits = []

    def open_page(**options) -> Visit:
        visits.append(Visit(browser, address, **options))
        return visits[-1]

    yield open_page
    for opened in visits:
        opened.page.context.close()
        assert opened.errors == []
        asked = {url for url in opened.requests if not url.startswith(("data:", "blob:"))}
        assert all(url.startswith(address) for url in asked), asked


def test_type_a_long_text(visit):
    page = visit().page
    expect(page.locator("#text textarea")).to_be_focused()
    page.keyboard.insert_text(LONG)
    page.keyboard.press("Enter")
    sections = page.locator(".answers section")
    expect(sections).to_have_count(2)
    assert sections.locator("h2").all_inner_texts() == ["ProCLIP", "CLIP"]
    assert [sections.nth(i).locator("li").count() for i in (0, 1)] == [5, 5]
    scores = [float(text) for text in sections.nth(0).locator(".score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    expect(sections.nth(0)).to_contain_text("Read to the end (at most 1024 tokens)")
    expect(sections.nth(1)).to_contain_text("Cut. This model reads 48 tokens")
    assert LONG.strip().endswith(sections.nth(1).locator("del").inner_text())
    boxes = [sections.nth(i).bounding_box() for i in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]  # side by side
    assert page.evaluate("[...document.querySelectorAll('.answers img')].every(i => i.naturalWidth && i.alt)")


def test_drop_an_image(visit, galleries):
    opened = visit()
    opened.drop("mine.jpg", (galleries[0].folder / "second/gray.png").read_bytes())
    expect(opened.page.locator(".answers li").first).to_contain_text("second/gray.png")
    assert opened.paths(1)[0] == "second/gray.png"


def test_drop_what_is_no_image(visit):
    opened = visit()
    opened.drop("page.jpg", b"<html>")
    expect(opened.page.get_by_role("alert").first).to_have_text("not an image of a format that Pillow reads")


def test_keyboard_and_clicks(visit):
    page = visit().page
    page.keyboard.press("Tab")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Type what the images show")
    page.get_by_text("a blue boat", exact=True).click()
    expect(page.locator("#text textarea")).to_have_value("a blue boat")
    page.locator("#search").click()
    expect(page.locator(".answers li")).to_have_count(10)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(visit, scheme):
    page = visit(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True).page
    page.locator("#text textarea").fill("wide" * 100 + " " + LONG)
    page.locator("#search").tap()
    expect(page.locator(".answers li")).to_have_count(10)
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    ink, ground = (
        sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.querySelector('{where}')).{what}"))[:3]))
        for where, what in ((".answers h2", "color"), ("body", "backgroundColor"))
    )  # fmt: skip
    assert (ink > 600 and ground < 150) if scheme == "dark" else (ink < 150 and ground > 600)


def get(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_no_file_is_given_out(address, galleries):
    status, config = get(address + "/config")
    assert status == 200
    root, here = galleries[0].folder, Path(__file__)
    for path in (
        "/etc/passwd", "../../../../../../etc/passwd", "%2Fetc%2Fpasswd", "/proc/self/environ", here, "pyproject.toml",
        root / "first/red.png", galleries[0].path / "index.json", "http://127.0.0.1:1/", "HTTP://127.0.0.1:1/",
    ):  # fmt: skip
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/"):
            status, body = get(address + route + urllib.parse.quote(str(path), safe="/%:"))
            assert status in (403, 404, 405, 422), (route, path, status, body[:100])
    assert get(address + "/gradio_api/proxy=http://127.0.0.1:1/")[0] in (403, 404)


@pytest.mark.parametrize("path", ["/etc/passwd", "photo", "http://127.0.0.1:1/x.png"])
def test_no_file_is_searched_for_that_was_not_uploaded(address, galleries, path):
    """The requests of the page, written by hand, with another file than an uploaded one."""
    path = str(galleries[0].folder / "first/red.png") if path == "photo" else path
    config = json.loads(get(address + "/config")[1])
    ids = {component["props"].get("elem_id"): component["id"] for component in config["components"]}
    (search,) = (one["id"] for one in config["dependencies"] if one["outputs"] == [ids["answers"]])
    image = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = {"data": ["", image], "fn_index": search, "session_hash": "me", "event_data": None}
    request = urllib.request.Request(
        address + "/gradio_api/queue/join?", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.status == 200
    with urllib.request.urlopen(address + "/gradio_api/queue/data?session_hash=me", timeout=30) as stream:
        messages = [json.loads(line[6:]) for line in stream.read().decode().splitlines() if line.startswith("data: ")]
    (end,) = (message for message in messages if message["msg"] == "process_completed")
    assert end["success"] is False and "root:" not in json.dumps(messages) and "<li>" not in json.dumps(messages)


def test_every_answer_forbids_other_places(address):
    with urllib.request.urlopen(address, timeout=30) as response:
        assert response.headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert b"fonts.googleapis" not in response.read()


def test_a_port_that_is_taken_is_named(galleries):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1, port {port}: another program does"):
            serve(galleries, port=port)


def test_it_listens_here_only(address):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)
