"""The site builds without a warning, and a browser opens every page of it: no error, no other host, fit for a phone.

It needs what `make docs` installs and Chromium (apt-get install chromium); the tests say which is missing.
"""

from __future__ import annotations

import functools
import http.server
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.docs.pages import ROOT
from tests.docs.test_api_pages import EVERY

pytestmark = pytest.mark.slow

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: `make docs` installs it (requirements-docs.txt)")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served, on this machine."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed: `make docs` installs it (requirements-docs.txt)")
    path = chromium()
    if path is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        opened = tools.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def paths(site: Path) -> list[str]:
    found = [page.relative_to(site).as_posix() for page in site.rglob("*.html")]
    return sorted(path.removesuffix("index.html") for path in found if path != "404.html")


# What sticks out of a page on the right and is not inside something that scrolls by itself.
TOO_WIDE = """() => {
  const limit = document.documentElement.clientWidth;
  const scrolls = x => { for (let e = x.parentElement; e; e = e.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)) return true; return false; };
  const out = [...document.querySelectorAll('.md-content *')].filter(x => x.getClientRects().length
    && x.getBoundingClientRect().right > limit + 1 && !scrolls(x));
  const width = document.documentElement.scrollWidth;
  const page = width > limit ? ['the page: ' + width] : [];
  return page.concat(out.slice(0, 3).map(x => x.tagName + ' ' + x.textContent.slice(0, 60)));
}"""


def test_every_page_opens(site, address, browser):
    """At a desk's and a phone's width, with everything that the page asks for."""
    pages = paths(site)
    assert len(pages) > 30
    wrong = []
    for size in (DESK, PHONE):
        page = browser.new_page(viewport=size)
        asked: list[str] = []
        said: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("response", lambda r, said=said: said.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.on("console", lambda m, said=said: said.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        for path in pages:
            page.goto(f"{address}/{path}", wait_until="load")
            said += [f"too wide: {what}" for what in page.evaluate(TOO_WIDE)]
            broken = page.evaluate("() => [...document.images].filter(x => !x.naturalWidth).map(x => x.src)")
            said += [f"no picture: {source}" for source in broken]
            if not page.locator("h1").count():
                said.append("no heading")
            said += [f"another host: {url}" for url in asked if not url.startswith((address, "data:", "blob:"))]
            wrong += [f"{path or 'home'} at {size['width']}: {what}" for what in said]
            asked.clear()
            said.clear()
        page.close()
    assert wrong == []


def test_the_search_finds_a_page(address, browser):
    page = browser.new_page(viewport=DESK)
    page.goto(address)
    page.locator("[data-md-component=search-query]").click()
    page.get_by_text("Type to start searching").wait_for(timeout=60000)  # its worker has read the index
    page.locator("[data-md-component=search-query]").press_sequentially("piecewise")
    page.locator(".md-search-result__link").first.wait_for(timeout=60000)
    assert page.locator(".md-search-result__link").count() > 1
    page.close()


def test_every_public_name_has_its_place(site):
    """An anchor for each, so that links from elsewhere stay."""
    text = "".join(page.read_text() for page in (site / "api").rglob("*.html"))
    assert [name for name in EVERY if f'id="{name}"' not in text and name != "posattn.plan"] == []


def test_what_is_too_wide_is_seen(browser):
    page = browser.new_page(viewport=PHONE)
    page.set_content("<div class=md-content><p style='width: 600px'>wide</p></div>")
    assert page.evaluate(TOO_WIDE)[1:] == ["P wide"]
    page.set_content("<div class=md-content><div style='overflow: auto'><p style='width: 600px'>wide</p></div></div>")
    assert page.evaluate(TOO_WIDE) == []
    page.close()
