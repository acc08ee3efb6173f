"""The ledger survives what a kill, a hostile hand or a wrong clock does to it; the status reads the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import mapconv
from mapconv.catalog.ledger import Ledger, read_lines
from mapconv.catalog.lock import is_locked, run_lock
from mapconv.catalog.status import read_status
from mapconv.errors import CatalogError, OutputError
from tests import examples
from tests.catalog.conftest import contents, ledger, poison

HEADER = b'{"ledger": 1, "mapconv_version": "0"}\n'


def line(entry: str = "a", **changes) -> dict:
    return {"entry": entry, "fingerprint": "f", "status": "done", "stat": "s", "content": "c"} | changes


@pytest.mark.parametrize("cut", [1, 5, 40, 300])
def test_a_torn_last_line_is_removed_and_its_entry_done_again(cut, adapters, tmp_path):
    out = tmp_path / "out"
    mapconv.convert_catalog(adapters, out)
    before, path = contents(out), out / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert mapconv.convert_catalog(adapters, out).converted == 1
    assert len(ledger(out)) == 6
    assert contents(out) == before


@pytest.mark.parametrize("text", [b"", b'{"led', HEADER[:-1]])
def test_a_ledger_that_was_hardly_begun(text, adapters, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ledger.jsonl").write_bytes(text)
    assert mapconv.convert_catalog(adapters, tmp_path / "out").converted == 6
    assert len(ledger(tmp_path / "out")) == 6


@pytest.mark.parametrize("text", [b'{"ledger": 2}\n', b"[1]\n", b"PK\x03\x04\n", b"{" * 3000 + b"\n"])
def test_what_is_no_ledger_is_left_alone(text, adapters, tmp_path):
    path = tmp_path / "out" / "ledger.jsonl"
    path.parent.mkdir()
    path.write_bytes(text)
    for use in (lambda: mapconv.convert_catalog(adapters, path.parent), lambda: read_status(path.parent)):
        with pytest.raises(CatalogError, match="not a ledger that this version"):
            use()
    assert path.read_bytes() == text


def test_lines_that_cannot_be_read_are_passed_over_and_counted(tmp_path):
    path = tmp_path / "ledger.jsonl"
    bad = [b"{}", b"null", b"{", json.dumps(line(seconds="1")).encode(), json.dumps(line(status="?")).encode(), b"\xff"]
    bad.append(b"x" * (3 << 20))
    path.write_bytes(HEADER + b"\n".join([*bad, json.dumps(line("good")).encode()]) + b"\n")
    with Ledger(path) as opened:
        assert opened.seen.keys() == {"good"}
        assert opened.broken == len(bad)
    assert f"{len(bad)} lines" in read_status(tmp_path).notes[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)


@settings(max_examples=examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=60) | st.dictionaries(st.sampled_from(list(line())), JSON), max_size=4))
@example([b'{"entry": "a", "fingerprint": "f", "status": "done", "error": "\\ud800"}'])
def test_any_ledger_is_read(tmp_path, found):
    path = tmp_path / "ledger.jsonl"
    parts = [part if isinstance(part, bytes) else json.dumps(line() | part).encode() for part in found]
    path.write_bytes(HEADER + b"\n".join(parts))
    read_status(tmp_path)
    with Ledger(path) as opened:
        opened.append([line("new", worst_error=float("nan"))])
    *_, last = read_lines(path)
    assert (last["entry"], last["worst_error"]) == ("new", None)


def test_one_lock_at_a_time_and_dead_owners_do_not_count(tmp_path):
    path = tmp_path / "run" / "lock"
    path.parent.mkdir()
    assert not is_locked(path)
    with run_lock(path):
        assert is_locked(path)
        with pytest.raises(OutputError, match="another run"), run_lock(path):
            pass
    assert not is_locked(path)
    path.write_text("999999999 on elsewhere")  # what a machine left behind that lost its power
    with run_lock(path):
        assert is_locked(path)


def test_the_status_of_a_run(adapters, tmp_path, run):
    poison(adapters / "a002", "nan")
    mapconv.convert_catalog(adapters, tmp_path / "out", limit=4)
    found = read_status(tmp_path / "out")
    assert (found.entries, found.done, found.failed, found.left, found.running) == (6, 3, 1, 2, False)
    assert found.by_kind[0]["kind"] == "AdapterError"
    assert found.per_second > 0
    mapconv.convert_catalog(adapters, tmp_path / "out")
    assert read_status(tmp_path / "out").least_faithful[0][0] == "a005"
    shown = run("catalog", "status", tmp_path / "out")
    assert shown.status == 0
    for word in ("6 of 6", "5 done, 1 failed, 0 left", "1 × AdapterError, such as a002", "least faithful"):
        assert word in shown.out
    table = json.loads(run("catalog", "status", tmp_path / "out", "--json").out)
    assert (table["done"], table["failed"]) == (5, 1)


def test_a_clock_that_jumps_is_no_matter(adapters, tmp_path):
    mapconv.convert_catalog(adapters, tmp_path / "out", limit=3)
    path = tmp_path / "out" / "ledger.jsonl"
    path.write_text(path.read_text().replace('"finished": "20', '"finished": "30'))
    facts = tmp_path / "out" / ".mapconv" / "run.json"
    for started in ("2990-01-01T00:00:00+00:00", "1970-01-01T00:00:00", "yesterday", ""):
        facts.write_text(json.dumps({"entries": 6, "started": started}))
        found = read_status(tmp_path / "out")
        assert found.done == 3
        assert found.per_second is None or found.per_second > 0
    assert mapconv.convert_catalog(adapters, tmp_path / "out").converted == 3


def test_the_status_needs_no_torch_and_no_yaml(tmp_path):
    (tmp_path / "ledger.jsonl").write_bytes(HEADER)
    code = (
        "import sys; from click.testing import CliRunner; from mapconv.cli import cli\n"
        f"assert CliRunner().invoke(cli, ['catalog', 'status', {str(tmp_path)!r}]).exit_code == 0\n"
        "assert not {'torch', 'huggingface_hub', 'numpy', 'yaml'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(mapconv.__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr


def test_a_run_with_nothing_to_do_needs_no_torch(adapters, tmp_path):
    catalog = tmp_path / "catalog.jsonl"
    catalog.write_text(json.dumps({"source": str(adapters / "a000"), "upgrade": {"dtype": "bfloat16"}}))
    mapconv.convert_catalog(catalog, tmp_path / "out")
    code = (
        f"import sys, mapconv; r = mapconv.convert_catalog({str(catalog)!r}, {str(tmp_path / 'out')!r}, workers=2)\n"
        "assert (r.done, r.converted) == (1, 0)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(mapconv.__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
