"""A catalog's page of 2,000 entries in the browser: rows exist while in view, links, failures, distributions."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.reporting.conftest import ENTRIES


@pytest.fixture(scope="session")
def lines(catalog):
    return [json.loads(line) for line in (catalog / "ledger.jsonl").read_text().splitlines()[1:]]


def first_row(page):
    return page.evaluate(
        """() => {
          const box = document.querySelector('.rows'), top = box.getBoundingClientRect().top + 60;
          const rows = [...box.querySelectorAll('tbody tr:not(.space)')];
          return rows.find((row) => row.getBoundingClientRect().bottom > top).querySelector('th').innerText;
        }"""
    )


def test_a_report_of_2000_entries_is_small(catalog_html):
    assert catalog_html.stat().st_size < 10e6


def test_only_rows_in_view_exist_wherever_it_is_scrolled(lines, catalog_html, visit):
    page = visit(catalog_html)
    assert page.evaluate("document.querySelectorAll('*').length") < 4000
    box = page.locator(".rows")
    box.scroll_into_view_if_needed()
    full = box.evaluate("node => node.scrollHeight")
    for part in (0.25, 0.5, 1.0):
        # What is to be seen after the frame in which it scrolled: no white gap, and the row that belongs there.
        box.evaluate(
            """(node, top) => new Promise((done) => {
              node.scrollTop = top; requestAnimationFrame(() => requestAnimationFrame(done)) })""",
            full * part,
        )
        assert box.evaluate("node => node.scrollHeight") == pytest.approx(full, abs=40)
        assert box.locator("tbody tr").count() < 80
        position = box.evaluate("node => node.scrollTop / node.querySelector('tbody tr:not(.space)').offsetHeight")
        names = [line["entry"] for line in lines]
        assert names.index(first_row(page)) == pytest.approx(position, abs=2)
    assert box.locator("tbody th").last.inner_text() == lines[-1]["entry"]
    assert box.locator("table").get_attribute("aria-rowcount") == str(ENTRIES + 1)
    assert box.locator("tbody tr[aria-rowindex]").last.get_attribute("aria-rowindex") == str(ENTRIES + 1)


def test_sorting_and_filtering_all_of_them(lines, catalog_html, visit):
    page = visit(catalog_html)
    table = page.locator("[data-table=entries]")
    table.get_by_role("button", name="KL").click()
    found = sorted((line for line in lines if line.get("kl") is not None), key=lambda line: -line["kl"])
    assert table.locator("tbody th").first.inner_text() == found[0]["entry"]
    table.get_by_role("button", name="KL").click()
    assert table.locator("tbody th").first.inner_text() == min(found, key=lambda line: line["kl"])["entry"]
    table.get_by_label("status").select_option("failed")
    failed = sum(line["status"] == "failed" for line in lines)
    assert table.locator("output").inner_text() == f"{failed} of 2,000 entries"
    table.get_by_label("Filter entries").fill("expected (32064")
    wanted = sum(line["kind"] == "PlacementError" for line in lines)
    assert table.locator("output").inner_text() == f"{wanted} of 2,000 entries"


def test_failures_by_kind_lead_into_the_table(lines, catalog_html, visit):
    page = visit(catalog_html)
    kinds = Counter(line["kind"] for line in lines if line["status"] == "failed").most_common()
    said = [text.split() for text in page.locator(".failure summary").all_inner_texts()]
    assert said == [[kind, str(count)] for kind, count in kinds]
    first = next(line for line in lines if line.get("kind") == kinds[0][0])
    assert page.locator(".failure li").first.inner_text() == f"{first['entry']} {first['error']}"
    page.locator(".failure summary").nth(1).click()
    page.locator(".failure button").nth(1).click()
    assert page.locator("output").inner_text() == f"{kinds[1][1]} of 2,000 entries"
    assert page.get_by_label("error", exact=True).input_value() == f"={kinds[1][0]}"


def test_links_are_relative_and_lead_to_folders_that_exist(lines, catalog, catalog_html, visit):
    page = visit(catalog_html)
    hrefs = page.evaluate("[...document.querySelectorAll('a[href]:not(.skip)')].map(node => node.getAttribute('href'))")
    done = [line["output"] for line in lines[:20] if line["status"] == "done"]
    assert {f"./{output}" for output in done} <= set(hrefs)
    assert all((catalog / href).is_dir() for href in hrefs)


def test_bars_say_what_they_count(lines, catalog_html, visit):
    page = visit(catalog_html)
    bars = page.locator("#histogram-seconds [data-tip]")
    counts = [
        int(tip.rpartition(": ")[2].split()[0].replace(",", ""))
        for tip in bars.evaluate_all("nodes => nodes.map(node => node.dataset.tip)")
    ]
    assert sum(counts) == sum(line["status"] == "done" for line in lines)
    tallest = counts.index(max(counts))
    bars.nth(tallest).hover()
    assert f": {max(counts):,} entries" in page.locator("#tip").inner_text()
    drawn = page.locator("#histogram-seconds u")
    heights = drawn.evaluate_all("nodes => nodes.map(node => node.getBoundingClientRect().height)")
    assert max(heights) == heights[tallest]
    assert heights[0] == pytest.approx(heights[tallest] * counts[0] / counts[tallest], abs=1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_alone(scheme, catalog_html, visit):
    page = visit(catalog_html, width=360, height=740, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
