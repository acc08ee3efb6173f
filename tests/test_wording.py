"""Sentences that hold a number or a value are English for every number, and cut nothing in two."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.config import parse_settings
from mapconv.placement.by_name import misfit_report
from mapconv.wording import (
    count,
    counted,
    fixed,
    gain,
    percent,
    rough_percent,
    rough_seconds,
    seconds,
    size,
    small,
    spread,
    tick,
)  # fmt: skip

PATH = Path("adapter_config.json")


def test_one_and_many():
    assert [counted(number, "module") for number in (0, 1, 2, 1000)] == [
        "0 modules",
        "1 module",
        "2 modules",
        "1,000 modules",
    ]


def test_one_module_that_does_not_fit():
    assert misfit_report(["x: no tensor"], 1).startswith("1 of the adapter's 1 module does not fit")
    assert misfit_report(["x: no tensor", "y: no tensor"], 3).startswith("2 of the adapter's 3 modules do not fit")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (gain(1.002138), "1.00214"), (gain(None), "–"), (gain(math.nan), "NaN"), (small(-math.inf), "−∞"),
        (small(0), "0"), (small(0.01234), "0.0123"), (small(1.234e-8), "1.2e-08"), (count(1234), "1,234"),
        (size(999), "999 B"), (size(1_250_000), "1.2 MB"), (size(3e15), "3,000.0 TB"), (seconds(0.421), "0.42 s"),
        (seconds(303), "5 min 03 s"), (seconds(7530), "2 h 05 min"), (tick("1.00e-09"), "1e-09"),
        (tick("10.0 MB"), "10 MB"), (tick("0.0010"), "0.001"), (percent(0.99281), "99.28%"), (fixed(None), "–"),
        (rough_percent(0), "0 %"), (rough_percent(0.5388), "54 %"), (rough_percent(0.004), "0.4 %"),
        (rough_percent(1e-7), "1e-05 %"), (rough_seconds(0.2), "1 s"), (rough_seconds(7.4), "7 s"),
        (rough_seconds(44), "40 s"), (rough_seconds(130), "2 min"), (rough_seconds(5000), "80 min"),
        (rough_seconds(5400), "2 h"), (spread([1, 1.00001], fixed), "1.0000"),
        (spread([1.2, 1], fixed), "1.0000 … 1.2000"),
    ],
)  # fmt: skip
def test_how_numbers_are_spelled(said, expected):
    assert said == expected


@pytest.mark.parametrize("method", ["OF_THE_FUTURE", "ALIEN"])
def test_unknown_methods_need_no_article(method):
    with pytest.raises(UnsupportedError, match=f'peft_type is "{method}", a method that is unknown to mapconv'):
        parse_settings({"peft_type": method}, PATH)


@pytest.mark.parametrize(
    ("value", "shown"),
    [("x" * 100, '"' + "x" * 50 + '…"'), (["x" * 30] * 4, "<list of 4 items>"), ({"a": "x" * 90}, "<dict of 1 item>")],
)
def test_a_long_value_is_cut_where_it_shows(value, shown):
    with pytest.raises((AdapterError, UnsupportedError)) as caught:
        parse_settings({"peft_type": "LORA", "of_the_future": value}, PATH)
    assert f"of_the_future={shown} is" in str(caught.value)
    assert json.dumps(value) not in str(caught.value)


def test_the_command_line_counts_one(run, base, lora, tmp_path):
    """One module of one adapter, as a user sees it."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(lora / "adapter_model.safetensors")
    one = sorted(tensors)[0].rpartition(".lora_")[0]
    (tmp_path / "one").mkdir()
    save_file({k: v for k, v in tensors.items() if k.startswith(one)}, tmp_path / "one" / "adapter_model.safetensors")
    config = json.loads((lora / "adapter_config.json").read_text()) | {"target_modules": ".*"}
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps(config))
    shown = run("inspect", tmp_path / "one").out
    assert " 1 module," in shown
    merged = run("merge", tmp_path / "one", "--base", base, "-o", tmp_path / "merged")
    assert "in 1 file," in merged.out
    assert "1 tensor merged" in merged.out
