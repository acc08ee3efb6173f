"""Files that anybody may have written: names that are markup, numbers that are none, paths that lead elsewhere."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mapconv
from mapconv.errors import AdapterError, CatalogError
from mapconv.fidelity.saved import weights_mark
from mapconv.reporting.catalog_page import catalog_page
from mapconv.reporting.ledger import read_ledger
from tests import examples
from tests.reporting.samples import data_of, entries, save_adapter, save_ledger

NAMES = (
    "</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "<!--<script>", "{{script}}{{data}}",
    "a'b\"c&amp;<b>", "\ud800half", "nul\0l", "\u202eturned", "line\u2028break", "javascript:alert(1)", "x" * 3000,
)  # fmt: skip
FIELDS = (*entries(1)[0], "kind", "error")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def test_names_are_text_in_a_catalog(tmp_path, visit):
    lines = []
    for number, name in enumerate(NAMES):
        failed = {"status": "failed", "kind": name, "error": name, "method": name, "base": name}
        done = {"status": "done", "output": name, "method": name, "base": name, "worst_error": 0.1, "seconds": 1.0}
        lines += [{"entry": f"{name}{number}"} | failed, {"entry": f"{number}{name}"} | done]
    (tmp_path / "out" / "javascript:alert(1)").mkdir(parents=True)
    out = mapconv.report(save_ledger(tmp_path / "out", lines), tmp_path / "out" / "report.html").out
    page = visit(out)
    page.on("dialog", lambda dialog: pytest.fail(f"a name ran as a script: {dialog.message}"))
    assert page.evaluate("[document.scripts.length, document.images.length]") == [2, 0]
    assert page.locator("output").inner_text() == f"{len(lines)} of {len(lines)} entries"
    cells = page.locator("tbody th button").all_text_contents()
    assert [NAMES[0] + "0", "0" + NAMES[0]] == cells[:2]
    assert page.locator(".failure b").first.text_content() in {name or "–" for name in map(_clean, NAMES)}
    hrefs = page.evaluate("[...document.querySelectorAll('a[href]:not(.skip)')].map(node => node.href)")
    assert hrefs
    assert all(href.startswith("file:///") and "javascript%3A" in href for href in hrefs)
    page.locator("tbody th button").first.click()
    assert NAMES[0] in page.get_by_role("dialog").inner_text()


def _clean(name: str) -> str:
    return "".join("\ufffd" if character in "\ud800\0\u202e" else character for character in name)


def test_names_are_text_in_an_adapter(tmp_path, visit):
    paths = [f"model.layers.{n}.{name}" for n, name in enumerate(("<img src=x>", '"onmouseover="alert(1)', "a&b"))]
    folder = save_adapter(tmp_path / "adapter", paths)
    record = json.loads((folder / "map_config.json").read_text())
    record["base"] = {"name": NAMES[0], "revision": NAMES[1], "fingerprint": NAMES[0]}
    record["source"] = {"name": NAMES[1], "method": NAMES[0], "source": {"name": NAMES[2]}}
    record["options"] = {NAMES[0]: NAMES[1]}
    record["modules"][0] |= {"base_tensor": NAMES[0]}
    (folder / "map_config.json").write_text(json.dumps(record))
    page = visit(mapconv.report(folder, tmp_path / "adapter.html").out)
    assert page.evaluate("[document.scripts.length, document.images.length]") == [2, 0]
    assert NAMES[0] in page.locator("#provenance").inner_text()
    page.locator('#map-gain [data-at="0,0"]').hover()
    assert "<img src=x>, layer 0" in page.locator("#tip").inner_text()


@settings(max_examples=examples(30))
@given(st.lists(st.dictionaries(st.sampled_from(FIELDS), values) | values, max_size=6))
def test_any_line_of_json_is_read_or_counted(tmp_path_factory, lines):
    folder = save_ledger(tmp_path_factory.mktemp("any"), lines)
    ledger = read_ledger(folder)
    page = catalog_page(ledger, folder / "report.html")
    rows = data_of(page)["entries"]["rows"]
    named = [line["entry"] for line in lines if isinstance(line, dict) and isinstance(line.get("entry"), str)]
    assert len(rows) == len(set(named))
    assert ledger.unreadable == len(lines) - len(named)
    page.encode()


def test_numbers_that_are_none_are_said_and_drawn_nowhere(tmp_path):
    lines = [
        {"entry": name, "status": "done", "kl": kl}
        for name, kl in (("a", math.nan), ("b", math.inf), ("c", 0.5), ("d", "0.5"), ("e", None))
    ]
    page = catalog_page(read_ledger(save_ledger(tmp_path, lines)), tmp_path / "report.html")
    table = data_of(page)["entries"]
    column = [column["key"] for column in table["columns"]].index("kl")
    assert [row[column] for row in table["rows"]] == [
        [None, "NaN"],
        [None, "∞"],
        [0.5, "0.5000"],
        [None, "–"],
        [None, "–"],
    ]
    assert "4 are without a number" in page


def test_paths_outside_of_the_catalog_are_not_linked(tmp_path):
    (tmp_path / "out" / "inside").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "out" / "way").symlink_to(tmp_path / "secret")
    outputs = [
        "inside",
        "../secret",
        str(tmp_path / "secret"),
        "way",
        ".",
        "",
        "absent",
        "x" * 5000,
        "a\0b",
        "inside/..",
    ]
    lines = [{"entry": str(n), "status": "done", "output": output} for n, output in enumerate(outputs)]
    ledger = read_ledger(save_ledger(tmp_path / "out", lines))
    table = data_of(catalog_page(ledger, tmp_path / "elsewhere" / "report.html"))["entries"]
    column = [column["key"] for column in table["columns"]].index("output")
    linked = {row[0]: row[column]["href"] for row in table["rows"] if isinstance(row[column], dict)}
    assert linked == {"0": "../out/inside"}


def test_an_entrys_own_report_is_what_its_link_opens(tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "report.html").write_text("")
    ledger = read_ledger(save_ledger(tmp_path, [{"entry": "a", "status": "done", "output": "a b"}]))
    assert '"href":"./a%20b/report.html"' in catalog_page(ledger, tmp_path / "report.html")


def test_the_last_line_of_an_entry_counts_and_a_torn_line_does_not(tmp_path):
    lines = [{"entry": "a", "status": "failed", "kind": "HubError"}, {"entry": "a", "status": "done"}]
    ledger = read_ledger(save_ledger(tmp_path, lines, torn='{"entry": "b", "status": "done", "attempts": 1'))
    assert [(entry.name, entry.status) for entry in ledger.entries] == [("a", "done")]
    assert ledger.unreadable == 0
    assert catalog_page(read_ledger(save_ledger(tmp_path, [], torn="{")), tmp_path / "r.html").count("None.") == 1


@pytest.mark.parametrize("head", ["", "\n", '{"ledger": 2}\n', "[1]\n", "\0\xff\n", "{" * 100_000 + "\n"])
def test_what_is_no_ledger_is_refused(head, tmp_path):
    (tmp_path / "ledger.jsonl").write_text(head, encoding="latin-1")
    with pytest.raises(CatalogError, match="ledger"):
        mapconv.report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_verify_report_of_other_types_or_weights(tmp_path):
    folder = save_adapter(tmp_path / "adapter")
    sound = {"format_version": 1, "weights": weights_mark(folder), "modules": [{"path": "a", "error": 0.1}]}
    changes = {"kl": math.nan, "kl_base": "much", "modules": [{"path": 2, "error": 0.1}], "weights": "sha256:0"}
    for name, value in changes.items():
        (folder / "verify.json").write_text(json.dumps(sound | {name: value}))
        with pytest.raises(AdapterError, match="other weights" if name == "weights" else rf"verify\.json: {name}"):
            mapconv.report(folder, tmp_path / "other.html")
