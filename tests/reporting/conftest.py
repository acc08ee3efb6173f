"""Pages in a real browser: Debian's chromium without a window, driven by playwright, with no way to a network.

Where there is no chromium those tests are skipped, and the last lines of the run say how to get it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import mapconv
from tests.reporting.samples import entries, save_adapter, save_ledger

_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
ENTRIES = 2000


def find_chromium() -> str:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("the report's page is tested in a browser: apt-get install chromium, and run the tests again")
    return chromium


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    chromium = find_chromium()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("the report's page is tested through playwright: pip install 'mapconv[dev]'.")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=list(_FLAGS))


@pytest.fixture
def visit(browser) -> Iterator[Callable[..., Any]]:
    """Open a file in a fresh profile. A message on the console, an error or any request but the file's own fails."""
    trouble: list[str] = []
    with ExitStack() as stack:

        def open_page(path: Path, *, width: int = 1200, height: int = 900, scheme: str = "light") -> Any:
            viewport = {"width": width, "height": height}
            context = browser.new_context(viewport=viewport, color_scheme=scheme, offline=True)
            stack.callback(context.close)
            context.set_default_timeout(60_000)
            page = context.new_page()
            url = path.resolve().as_uri()
            page.on("console", lambda message: trouble.append(message.text))
            page.on("pageerror", lambda error: trouble.append(str(error)))
            page.on("request", lambda request: request.url == url or trouble.append(f"request: {request.url}"))
            page.goto(url)
            return page

        yield open_page
    assert trouble == []


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> Path:
    """A calibrated MAP directory of 6 layers, one of them without a module, and an lm_head."""
    return save_adapter(tmp_path_factory.mktemp("reported") / "adapter")


@pytest.fixture(scope="session")
def adapter_html(adapter) -> Path:
    return mapconv.report(adapter, adapter.parent / "adapter.html").out


@pytest.fixture(scope="session")
def catalog(tmp_path_factory) -> Path:
    """The output of a run over 2,000 adapters; the folders of the first fifty are there."""
    folder = tmp_path_factory.mktemp("reported") / "catalog"
    lines = entries(ENTRIES)
    for line in lines[:50]:
        if line["status"] == "done":
            (folder / line["output"]).mkdir(parents=True)
    return save_ledger(folder, lines)


@pytest.fixture(scope="session")
def catalog_html(catalog) -> Path:
    return mapconv.report(catalog, catalog / "report.html").out


@pytest.fixture(scope="session")
def merged(tmp_path_factory, half_base, lora) -> Path:
    """A merged model's folder."""
    return mapconv.merge(lora, tmp_path_factory.mktemp("reported") / "merged", base=half_base).out
