"""Pages in a real browser: Debian's chromium without a window, driven by playwright, with no way to a network.

Where there is no chromium those tests are skipped, and the last lines of the run say how to get it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
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
def tab() -> Iterator[Any]:
    """One page for all tests: the browser begins a process for each new one, which takes longer than to load it."""
    chromium = find_chromium()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("the report's page is tested through playwright: pip install 'mapconv[dev]'.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(_FLAGS))
        page = browser.new_context(offline=True).new_page()
        page.set_default_timeout(60_000)
        yield page
        browser.close()


@pytest.fixture
def visit(tab) -> Iterator[Callable[..., Any]]:
    """Open a file as a newcomer. A message on the console, an error or any request but the file's own fails."""
    trouble: list[str] = []
    address = "about:blank"
    listeners = {
        "console": lambda message: trouble.append(message.text),
        "pageerror": lambda error: trouble.append(str(error)),
        "request": lambda request: request.url == address or trouble.append(f"request: {request.url}"),
    }

    def open_page(path: Path, *, width: int = 1200, height: int = 900, scheme: str = "light") -> Any:
        nonlocal address
        address = path.resolve().as_uri()
        tab.set_viewport_size({"width": width, "height": height})
        tab.emulate_media(media="screen", color_scheme=scheme)
        tab.mouse.move(0, 0)
        tab.goto(address)
        return tab

    for event, listener in listeners.items():
        tab.on(event, listener)
    yield open_page
    tab.evaluate("localStorage.clear()")
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
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
