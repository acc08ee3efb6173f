"""Runs that are cut off: SIGKILL leaves nothing half-written, --resume goes on to the same bytes, Ctrl-C keeps all."""

from __future__ import annotations

import filecmp
import multiprocessing
import os
import signal
import sys
import time

import pytest

import mapconv
from mapconv.cli import main
from mapconv.training import calibration
from tests.cli.refusals import assert_refused
from tests.files import copy
from tests.training.conftest import SETTINGS

STEPS = 6
FILES = ("adapter_model.safetensors", "adapter_config.json", "map_config.json", "README.md")


@pytest.fixture
def at_every_step(monkeypatch):
    """Checkpoints after each step instead of every few minutes."""
    monkeypatch.setattr(calibration, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture
def start(command_line, tmp_path, at_every_step):
    """Run the command in a process of its own, forked with everything in memory; its stderr goes to a file."""

    def run(words):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
        with open(tmp_path / "stderr", "w") as sys.stderr:
            os.dup2(sys.stderr.fileno(), 2)
            sys.argv = ["mapconv", *command_line, "-o", str(tmp_path / "out"), *map(str, words)]
            main()

    def begin(*words):
        process = multiprocessing.get_context("fork").Process(target=run, args=(words,))
        process.start()
        return process

    return begin


def wait_for_a_checkpoint(process, folder):
    while process.is_alive() and not (folder / ".out.checkpoint").exists():
        time.sleep(0.002)
    assert process.is_alive()


def names(folder):
    return {path.name for path in folder.iterdir()} - {"stderr"}


def assert_same(first, second):
    for name in FILES:
        assert filecmp.cmp(first / name, second / name, shallow=False), name


@pytest.mark.parametrize("train", ["scalars", "all"])
def test_killed_and_resumed_to_the_same_bytes(train, start, calibrated, tmp_path):
    calibrated(out=tmp_path / "whole", steps=STEPS, train=train)
    victim = start("--steps", STEPS, "--train", train)
    wait_for_a_checkpoint(victim, tmp_path)
    victim.kill()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    result = calibrated(steps=STEPS, train=train, resume=True)
    assert any(note.startswith("resumed after step ") for note in result.report.notes)
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert names(tmp_path) == {"out", "whole"}


def test_ctrl_c_writes_the_best_so_far(start, closed_form, source, tmp_path):
    process = start("--steps", 100_000)
    wait_for_a_checkpoint(process, tmp_path)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    said = (tmp_path / "stderr").read_text()
    assert process.exitcode == 130, said
    assert "note: interrupted after step " in said
    assert "of 100000; the best state, of step " in said
    assert names(tmp_path) == {"out"}
    assert mapconv.verify(tmp_path / "out", source, samples=1).kl < 1


def test_a_checkpoint_is_not_thrown_away_unasked(run, start, command_line, tmp_path):
    victim = start("--steps", STEPS)
    wait_for_a_checkpoint(victim, tmp_path)
    victim.kill()
    victim.join()
    words = [*command_line, "-o", tmp_path / "out"]
    assert_refused(run(*words, "--steps", STEPS), "--resume", "--force")
    assert_refused(run(*words, "--steps", STEPS, "--resume", "--lr", "1e-4"), "other learning_rate")
    assert_refused(run(*words, "--steps", STEPS + 1, "--resume"), "other steps")
    assert_refused(run(*words, "--steps", STEPS, "--resume", "--sequence-length", "16"), "held-out data")
    (tmp_path / ".out.checkpoint").write_bytes(b"PK")
    assert_refused(run(*words, "--steps", STEPS, "--resume"), "is not a mapconv checkpoint")
    assert names(tmp_path) == {".out.checkpoint"}
    assert run(*words, "--steps", "1", "--force").status == 0
    assert names(tmp_path) == {"out"}


def test_resuming_where_nothing_was_left(calibrated):
    assert (
        "there is no checkpoint to resume from: the run began at step 0"
        in calibrated(steps=1, resume=True).report.notes
    )


def test_an_old_result_survives_a_kill(start, closed_form, tmp_path):
    """With --force OUT is replaced at the end alone."""
    out = copy(closed_form, tmp_path / "out")
    victim = start("--steps", 100_000, "--force")
    wait_for_a_checkpoint(victim, tmp_path)
    victim.kill()
    victim.join()
    assert_same(out, closed_form)


def _one_of_two(rank, arguments, settings):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    result = mapconv.calibrate(*arguments, **settings)
    assert (result is None) == (rank == 1)


def test_two_processes_compute_what_one_does(calibrated, closed_form, source, text, tmp_path, monkeypatch):
    """A batch of 3: the shares differ in size, and the mean is over the whole batch."""
    alone = calibrated(steps=4, batch_size=3)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(20_000 + os.getpid() % 20_000))
    settings = {"against": source, "data": text, "out": tmp_path / "pair", "steps": 4, **SETTINGS, "batch_size": 3}
    context = multiprocessing.get_context("fork")
    pair = [context.Process(target=_one_of_two, args=(rank, [closed_form], settings)) for rank in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
        assert process.exitcode == 0
    from tests.training.conftest import read_record

    together = read_record(tmp_path / "pair")["calibration"]
    assert together["models"]["calibrated"]["kl"] == pytest.approx(alone.models["calibrated"].kl, rel=1e-3)
    assert together["tokens"] == alone.report.tokens
    assert names(tmp_path) == {"out", "pair"}
