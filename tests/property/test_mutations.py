"""A few of the inputs of ``examples/benchmarks/fuzz.py``, the same in each run: none may end in another error."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def fuzz():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import fuzz

        yield fuzz
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def drawn_once(monkeypatch):
    """The picture of a card depends on its modules alone: those that no mutation reaches are drawn once."""
    if find_spec("matplotlib") is not None:
        from mapconv.publishing import picture

        monkeypatch.setattr(picture, "scalars_png", cache(picture.scalars_png))


def test_no_mutated_file_ends_in_an_error_that_is_not_ours(fuzz, drawn_once, tmp_path):
    found = {}
    for target in fuzz.targets(tmp_path):
        found[target.name] = fuzz.run(target, 10 + 2 * target.share, seed=1)
    assert {name: counts for name, counts in found.items() if counts["unexpected"]} == {}
    assert len(found) >= 22
    assert sum(counts["fine"] for counts in found.values()) > 200  # or the mutations reach nothing but the parsers


def test_an_error_that_is_not_ours_is_counted(fuzz):
    def fail():
        raise KeyError("x")

    assert fuzz.outcome(fail)[0] == "unexpected"
    assert fuzz.outcome(lambda: None) == ("fine", None)
