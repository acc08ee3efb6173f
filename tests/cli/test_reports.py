"""What commands print: results on stdout, talk on stderr, JSON that programs read, and nothing written by --dry-run."""

from __future__ import annotations

import json
import math

import pytest

import mapconv
from tests.cli.refusals import assert_refused, nothing_written
from tests.files import listing


def strict_json(text):
    """Parse as a reader would that knows no NaN."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def map_folder(dora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports") / "map"
    mapconv.upgrade(dora, folder)
    return folder


def test_json_of_inspect(run, dora, base):
    table = strict_json(run("inspect", dora, "--json").out)
    assert table["method"] == "DoRA"
    assert table["modules"] == 14
    assert table["base"] == str(base)
    assert table["fits"] is None
    assert {group["module_type"]: group["count"] for group in table["targets"]}["q_proj"] == 2
    assert table["targets"][0]["ranks"] == [4]
    assert table["targets"][0]["scalings"] == [2.0]
    assert strict_json(run("inspect", dora, "--base", base, "--json").out)["fits"] == str(base)


def test_json_of_upgrade(run, dora, tmp_path):
    result = run("upgrade", dora, "-o", tmp_path / "map", "--json")
    table = strict_json(result.out)
    recorded = json.loads((tmp_path / "map" / "map_config.json").read_text())
    assert result.status == 0
    assert result.err == ""
    assert table["out"] == str(tmp_path / "map")
    found = mapconv.inspect(tmp_path / "map")
    assert (table["parameters"], table["nbytes"]) == (found.parameters, found.nbytes)
    assert table["plan"]["refitted"] == 14
    assert [module["alpha"] for module in table["modules"]] == [module["alpha"] for module in recorded["modules"]]
    assert table["worst_error"] == max(module["error"] for module in recorded["modules"])


def test_json_of_merge(run, lora, tmp_path):
    table = strict_json(run("merge", lora, "-o", tmp_path / "out", "--json").out)
    assert table["files"] == ["model.safetensors"]
    assert table["nbytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert table["tensors"] == 21
    assert len(table["merged"]) == 14


def test_json_of_verify_is_printed_even_when_it_fails(run, map_folder, dora):
    words = ["verify", map_folder, "--against", dora, "--samples", 1, "--json"]
    table = strict_json(run(*words).out)
    assert table["tokens"] == 255
    failed = run(*words, "--max-kl", table["kl"] / 2)
    assert failed.status == 1
    assert strict_json(failed.out)["kl"] == table["kl"]
    assert "--max-kl" in failed.err
    assert run(*words, "--max-kl", table["kl"] * 2).status == 0


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_dry_runs_write_nothing(as_json, run, lora, dora, tmp_path):
    with nothing_written(tmp_path, lora.parent):
        for words in (
            ["upgrade", lora, "-o", tmp_path / "out"],
            ["upgrade", dora],
            ["merge", dora, "-o", tmp_path / "new" / "out", "--max-shard-size", "20KB", "--dtype", "bfloat16"],
        ):
            result = run(*words, "--dry-run", *as_json)
            assert result.status == 0
            assert ("would write" in result.out) == (not as_json)
            if as_json:
                assert strict_json(result.out)["dry_run"] is True


def test_a_dry_run_of_merge_foretells_the_result(run, dora, tmp_path):
    words = ["merge", dora, "-o", tmp_path / "out", "--max-shard-size", "20KB", "--dtype", "bfloat16", "--json"]
    foretold, done = strict_json(run(*words, "--dry-run").out), strict_json(run(*words).out)
    assert {name: foretold[name] for name in ("files", "tensors", "nbytes", "out")} == {
        name: done[name] for name in ("files", "tensors", "nbytes", "out")
    }
    assert done["nbytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))


def test_a_dry_run_finds_what_would_stop_the_run(run, lora, tmp_path):
    (tmp_path / "out").mkdir()
    assert_refused(run("merge", lora, "-o", tmp_path / "out", "--dry-run"), "exists already")


def test_the_table_of_upgrade(run, dora, tmp_path):
    result = run("upgrade", dora, "-o", tmp_path / "map")
    lines = result.out.splitlines()
    modules = json.loads((tmp_path / "map" / "map_config.json").read_text())["modules"]
    for head in ("modules", "rank", "α/‖W0‖", "β/α", "ε worst", "ε median"):
        assert any(head in line for line in lines[:8])
    row = next(line.split() for line in lines if line.strip().startswith("down_proj"))
    errors = [module["error"] for module in modules if module["path"].endswith("down_proj")]
    assert row[1:3] == ["2", "4"]
    assert row[-2:] == [f"{max(errors):.4f}", f"{math.fsum(errors) / 2:.4f}"]
    assert "advice" in result.out  # this DoRA loses much at its own rank
    assert "advice" not in run("upgrade", dora, "-o", tmp_path / "exact", "--direction", "dora").out


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_no_progress_bars_where_no_terminal_watches(quiet, run, lora, dora, map_folder, tmp_path):
    for words in (
        ["upgrade", dora, "-o", tmp_path / "map"],
        ["merge", lora, "-o", tmp_path / "merged"],
        ["verify", map_folder, "--against", dora, "--samples", 1],
    ):
        result = run(*words, *quiet)
        assert result.status == 0
        assert result.err == ""


def test_progress_bars_on_a_terminal(run, lora, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert "merging" in run("merge", lora, "-o", tmp_path / "seen").err
    assert run("merge", lora, "-o", tmp_path / "quiet", "--quiet").err == ""


def test_debug_shows_the_traceback_and_the_sentence(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MAPCONV_DEBUG", "1")
    result = run("inspect", tmp_path / "absent")
    assert result.status == 1
    assert "Traceback (most recent call last)" in result.err
    assert result.err.splitlines()[-1].startswith("mapconv: error: ")
    monkeypatch.setenv("MAPCONV_DEBUG", "0")
    assert_refused(run("inspect", tmp_path / "absent"), "does not exist")


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), (b"", "is empty"), (b"\xff\xfe\xff", "not UTF-8"), (b"a", "1 tokens")],
)
def test_text_that_cannot_be_used(content, said, run, map_folder, dora, tmp_path):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    assert_refused(run("verify", map_folder, "--against", dora, "--data", tmp_path / "text"), said)


def test_verify_of_something_that_is_no_result(run, dora, tmp_path):
    (tmp_path / "empty").mkdir()
    before = listing(tmp_path)
    assert_refused(run("verify", tmp_path / "empty", "--against", dora), tmp_path / "empty")
    assert_refused(run("verify", tmp_path / "absent", "--against", dora), tmp_path / "absent")
    assert listing(tmp_path) == before
