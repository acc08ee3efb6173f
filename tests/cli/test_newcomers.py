"""What people type who do not know mapconv yet: each mistake is answered by what they need next."""

from __future__ import annotations

import json
import os
import pty
import sys

import pytest

import mapconv
from mapconv.cli import output
from mapconv.cli.upgrade import advice_for
from mapconv.options.commands import UPGRADE
from tests.cli.refusals import assert_refused, nothing_written
from tests.files import copy


@pytest.mark.parametrize(("typed", "meant"), [("upgarde", "upgrade"), ("veryfy", "verify"), ("catalogue", "catalog")])
def test_a_command_is_suggested(typed, meant, run):
    result = run(typed, "x")
    assert result.status == 2
    assert f"Did you mean {meant!r}?" in result.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "b", "--weights", "0.5", "0.5"], "separate them with commas (--weights 0.5,0.5)"),
        (["a", "b", "--weights", "0.5"], "--weights has 1 number for 2 adapters"),
        (["a", "--max-shard-size", "5"], "such as 5GB: 5 alone would be bytes"),
        (["a", "--max-shard-size", "0.5GiB", "--weights", "1,2"], "2 numbers for 1 adapter"),
    ],
)
def test_usage_of_merge(words, said, run, tmp_path):
    result = run("merge", *words, "-o", tmp_path / "out")
    assert result.status == 2
    assert said in result.err


def test_a_folder_of_checkpoints_lists_them(run, lora, tmp_path):
    for step in (90, 100):
        copy(lora, tmp_path / "run" / f"checkpoint-{step}")
    result = run("upgrade", tmp_path / "run")
    assert_refused(result, "(checkpoint-90, checkpoint-100)", tmp_path / "run" / "checkpoint-100")


def test_a_model_is_called_one(run, base):
    assert_refused(run("inspect", base), f"{base} is a full model", "mapconv extract")


def test_a_base_that_is_not_there_is_not_looked_for_on_the_hub(run, lora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with nothing_written(tmp_path):
        assert_refused(run("upgrade", lora, "--base", "nosuchbase"), "there is no folder nosuchbase here")


def test_the_source_is_no_result(run, dora):
    assert_refused(run("verify", dora, "--against", dora), "is the source itself")


def test_env_says_what_a_bug_report_needs(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = run("env")
    for word in ("mapconv", "Python", "torch", "peft", "devices", "cached norms", "Hub cache"):
        assert word in found.out
    table = json.loads(run("env", "--json").out)
    assert table["mapconv"] == mapconv.__version__
    assert "hf_secret" not in found.out + str(table)


def test_verbose_says_what_is_done(run, dora, tmp_path):
    plain = run("upgrade", dora, "-o", tmp_path / "a", "--json")
    told = run("upgrade", dora, "-o", tmp_path / "b", "--json", "-v")
    assert plain.err == ""
    assert "placed 14 modules" in told.err
    assert told.err.count(": refit, rank 4, ε ") == 14
    assert json.loads(told.out)["modules"] == json.loads(plain.out)["modules"]
    assert run("upgrade", dora, "-o", tmp_path / "c", "--json").err == ""
    assert run("upgrade", dora, "-v", "-q").status == 2


def test_the_package_shows_its_functions():
    assert {"upgrade", "merge", "verify", "MapConfig", "print_trainable_parameters"} <= set(dir(mapconv))
    assert "import_module" not in dir(mapconv)
    assert all(hasattr(mapconv, name) for name in dir(mapconv))


@pytest.mark.parametrize(
    "words",
    [["--rank", 1], ["--lora-compatible"], ["--lora-compatible", "--rank", 1], []],
    ids=lambda w: " ".join(map(str, w)),
)
def test_advice_goes_with_what_was_chosen(words, run, dora, tmp_path):
    result = run("upgrade", dora, "-o", tmp_path / "map", *words)
    advice = next(line for line in result.out.splitlines() if "advice:" in line)
    assert "--data FILE" in advice
    assert ("--rank above 1" in advice) == ("--rank" in words)
    assert ("--direction dora" in advice) == ("--lora-compatible" not in words)
    assert ("--tolerance" in advice) == ("--rank" not in words)


def test_advice_about_a_tolerance_that_was_missed(dora, tmp_path):
    result = mapconv.upgrade(dora, tmp_path / "map", tolerance=0.01, max_rank=1)
    chosen = {name: option.default for name, option in UPGRADE.options.items()} | {"tolerance": 0.01}
    advice = advice_for(result, chosen | {"max_rank": 1})
    assert advice.endswith("at --max-rank 1: raise it; or use --direction dora in place of --tolerance")
    assert "dora" not in advice_for(result, chosen | {"max_rank": 1, "lora_compatible": True})


def test_a_narrow_terminal_gets_a_line_a_column(monkeypatch, capsys):
    head, rows = ["target", "ε worst", "ε median"], [["down_proj", "0.1", "0.2"]]
    monkeypatch.setattr(output, "_columns", lambda: 29)
    output.print_table(head, rows)
    assert capsys.readouterr().out == "  down_proj\n    ε worst   0.1\n    ε median  0.2\n"
    monkeypatch.setattr(output, "_columns", lambda: 30)
    output.print_table(head, rows)
    assert capsys.readouterr().out.splitlines()[-1] == "  down_proj      0.1       0.2"


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    leader, follower = pty.openpty()
    with os.fdopen(leader), os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert output.coloured("x", "red") == "\x1b[31mx\x1b[0m"
        monkeypatch.setenv("NO_COLOR", "1")
        assert output.coloured("x", "red") == "x"
    monkeypatch.undo()


@pytest.mark.parametrize("limit", [("--rank", 1), ("--tolerance", 0.5)])
def test_a_rank_does_not_cut_what_is_kept_of_a_dora(run, dora, limit, tmp_path):
    result = run("upgrade", dora, "-o", tmp_path / "out", "--direction", "dora", *limit)
    assert result.status == 1
    assert "keeps DoRA's own values" in result.err
    assert not (tmp_path / "out").exists()
