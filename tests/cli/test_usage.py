"""Wrong usage exits 2, help exits 0, and starting the command line is cheap."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mapconv
from mapconv.cli import COMMANDS


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["upgrade"], "SOURCE"),
        (["merge", "adapter"], "--out"),
        (["verify", "result"], "--against"),
        (["transmogrify"], "transmogrify"),
        (["upgrade", "source", "--rank", "0"], "--rank"),
        (["upgrade", "source", "--rank", "many"], "--rank"),
        (["upgrade", "source", "--tolerance", "0"], "--tolerance"),
        (["upgrade", "source", "--tolerance", "1.5"], "--tolerance"),
        (["upgrade", "source", "--rank", "4", "--tolerance", "0.1"], "cannot be used together"),
        (["upgrade", "source", "--max-rank", "4"], "--tolerance"),
        (["upgrade", "source", "--lora-compatible", "--direction", "dora"], "--lora-compatible"),
        (["upgrade", "source", "--direction", "up"], "--direction"),
        (["upgrade", "source", "--dtype", "int8"], "--dtype"),
        (["upgrade", "source", "--device", "tpu"], "--device"),
        (["merge", "adapter", "-o", "out", "--max-shard-size", "big"], "big"),
        (["merge", "adapter", "-o", "out", "--max-shard-size", "0GB"], "0GB"),
        (["merge", "adapter", "-o", "out", "--max-shard-size", "-5GB"], "-5GB"),
        (["merge", "adapter"], "--push-to"),
        (["merge", "adapter", "-o", "out", "--push-to", "me/x"], "cannot be used together"),
        (["merge", "adapter", "-o", "out", "--private"], "--private requires --push-to"),
        (["merge", "adapter", "--push-to", "me/x", "--min-survival", "0.5", "--quantized", "keep"], "whole model"),
        (["verify", "result", "--against", "source", "--samples", "0"], "--samples"),
        (["verify", "result", "--against", "source", "--max-kl", "-1"], "--max-kl"),
        (["inspect", "source", "--loud"], "--loud"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_and_names_the_word(words, said, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.status == 2
    assert said in result.err
    assert result.out == ""
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "size"), [("20KB", 20_000), ("20kib", 20_480), ("0.02 MB", 20_000), ("20000", 20_000)]
)
def test_spellings_of_a_size(text, size, run, lora, tmp_path):
    assert run("merge", lora, "-o", tmp_path / "cli", "--max-shard-size", text).status == 0
    files = mapconv.merge(lora, tmp_path / "api", max_shard_size=size).files
    assert sorted(path.name for path in (tmp_path / "cli").glob("*.safetensors")) == sorted(files)


def test_help_names_every_command_and_every_command_has_help(run):
    text = run("--help")
    assert text.status == 0
    for name in COMMANDS:
        assert name in text.out
        own = run(name, "--help")
        assert own.status == 0
        assert f"mapconv {name} [OPTIONS]" in own.out.splitlines()[0]


def test_version(run):
    assert run("--version").out.strip() == f"mapconv, version {mapconv.__version__}"


HEAVY = ("torch", "transformers", "peft", "safetensors", "huggingface_hub", "numpy")


def test_help_and_usage_errors_import_nothing_heavy():
    """One process for all: whoever imports such a module first is named."""
    words = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS), ["upgrade"]]
    program = (
        "import contextlib, io, sys\n"
        "from mapconv.cli import main\n"
        f"for words in {words!r}:\n"
        "    sys.argv = ['mapconv', *words]\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "        main()\n"
        f"    found = set({HEAVY!r}) & set(sys.modules)\n"
        "    assert not found, (words, found)\n"
        "    assert out.getvalue() or words == ['upgrade'], words\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy():
    program = f"import mapconv, sys; sys.exit(bool(set({HEAVY!r}) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), (["upgrade"], 2)])
def test_exit_status_of_the_process(words, status):
    """Status 1, of an error: test_streams.py."""
    done = subprocess.run([sys.executable, "-m", "mapconv", *words], capture_output=True, text=True)
    assert done.returncode == status
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_early_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m mapconv upgrade --help | head -c 1", shell=True, capture_output=True, text=True
    )
    assert done.stdout == "U"
    assert done.stderr == ""
