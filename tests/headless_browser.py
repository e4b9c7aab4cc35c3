"""Opens a page in a real browser, Chromium without a window, and says what is in it.

In CI (`CI` or `PROCLIP_REQUIRE_BROWSER` is set) a missing browser is an error; elsewhere the tests that need one are skipped and say why.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# The report itself runs no script and allows none. A copy of it gets this one, and a policy that differs in nothing else: whatever else the page
# would fetch is still refused, and is reported as a violation.
POLICY = re.compile(r"(default-src 'none'; img-src data:; style-src 'unsafe-inline')")
SCRIPT = """<script>
const facts = {violations: [], errors: []};
document.addEventListener("securitypolicyviolation", event => facts.violations.push(event.blockedURI));
window.addEventListener("error", event => facts.errors.push(String(event.message || event.target.src)), true);
window.addEventListener("load", () => {
  const all = selector => [...document.querySelectorAll(selector)];
  facts.images = all("img").map(image => ({
    alt: image.alt, complete: image.complete, width: image.naturalWidth, height: image.naturalHeight,
    shown: image.getBoundingClientRect().width, source: image.currentSrc.slice(0, 22)}));
  facts.tables = Object.fromEntries(all("table").map((table, i) => [table.id || "table-" + i, {
    caption: table.caption && table.caption.textContent, header: [...table.tHead.rows[0].cells].map(cell => cell.innerText),
    rows: [...table.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.innerText))}]));
  facts.headings = all("h1, h2, h3").map(heading => [heading.tagName, heading.innerText]);
  facts.text = document.body.innerText;
  facts.requests = performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:"));
  facts.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  facts.ground = getComputedStyle(document.body).backgroundColor;
  const out = document.createElement("script");
  out.type = "application/json";
  out.id = "facts";
  out.textContent = JSON.stringify(facts).replaceAll("<", "\\\\u003c");
  document.body.append(out);
});
</script>"""


def find_browser() -> str:
    """The browser's command. Skips the test without one, or fails where one is required."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    message = (
        f"no browser found (looked for {', '.join(BROWSERS)}): install Debian's package chromium to run this test"
    )
    if os.environ.get("CI") or os.environ.get("PROCLIP_REQUIRE_BROWSER"):
        pytest.fail(message)
    pytest.skip(message)


def open_page(page: Path, folder: Path, width: int = 1100, dark: bool = False) -> dict[str, Any]:
    """Renders the HTML file `page` and returns what the script above found; `folder` is for the copy and the browser's profile."""
    html, replaced = POLICY.subn(r"\1; script-src 'unsafe-inline'", page.read_text(encoding="utf-8"))
    assert replaced == 1, "the page has no content security policy, or another one"
    copy = folder / "page.html"
    copy.write_text(html.replace("<head>", "<head>" + SCRIPT, 1), encoding="utf-8")
    done = _run(folder, width, dark, "--dump-dom", copy.as_uri())
    found = re.search(r'<script type="application/json" id="facts">(.*?)</script>', done.stdout, re.DOTALL)
    assert found, f"the page did not load: {done.stderr[-2000:]}"
    facts = json.loads(found[1])
    # What a page writes to the console, a refused request included, comes as a line with CONSOLE.
    facts["console"] = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return facts


def take_screenshot(page: Path, folder: Path, width: int = 1100, height: int = 1600, dark: bool = False) -> Path:
    """A PNG of the top of the page itself, without any script."""
    target = folder / "screenshot.png"
    _run(folder, width, dark, f"--screenshot={target}", page.resolve().as_uri(), height=height)
    return target


def _run(
    folder: Path, width: int, dark: bool, *arguments: str, height: int = 1600
) -> subprocess.CompletedProcess[str]:
    command = [
        find_browser(),
        "--headless",
        "--no-sandbox",  # as root it has none
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--enable-logging=stderr",
        "--hide-scrollbars",
        "--virtual-time-budget=10000",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},{height}",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"the browser failed: {done.stderr[-2000:]}"
    return done
