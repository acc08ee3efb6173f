"""The examples run as their docstrings say."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(forked, tmp_path):
    numbers = count()

    def call(name: str, *arguments: object) -> str:
        words = [name, *map(str, arguments)]
        folder = tmp_path / "processes" / str(next(numbers))
        done = forked.run((EXAMPLES / name).read_text(), words, dict(os.environ), folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_inspect_upgrade_verify_merge(run, base, dora, tmp_path):
    assert "DoRA, 14 modules" in run("inspect_adapter.py", dora, base)
    assert "14 modules in" in run("upgrade_adapter.py", dora, tmp_path / "map", base)
    assert "KL" in run("verify_result.py", tmp_path / "map", dora, base)
    assert "14 tensors merged" in run("merge_adapter.py", tmp_path / "map", tmp_path / "merged", base)
    assert (tmp_path / "merged" / "config.json").is_file()


def test_train_and_run_a_live_model(run, base, dora, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12)
    output = run("train_map.py", base, text, tmp_path / "map", 6)
    before, after = (float(line.split()[-1]) for line in output.splitlines()[:2])
    assert after < before
    assert float(output.split()[-1]) < 1e-4
    assert "adapter: '" in run("run_adapter.py", base, tmp_path / "map", "the quick")
    assert "14 layers" in run("run_adapter.py", base, dora, "the quick")
