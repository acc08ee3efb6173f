"""Sentences that hold a number or a value are English for every number, and cut nothing in two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.config import parse_settings
from mapconv.placement.by_name import misfit_report
from mapconv.wording import counted

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


@pytest.mark.parametrize("method", ["ADALORA", "IA3", "VERA"])
def test_other_methods_need_no_article(method):
    with pytest.raises(UnsupportedError, match=f'peft_type is "{method}", and mapconv converts LoRA and DoRA'):
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
