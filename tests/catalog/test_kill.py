"""SIGKILL at random moments of a run: what later runs make of it has the bytes of an uninterrupted one."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import time

import mapconv
from tests import examples
from tests.catalog.conftest import contents, ledger

ROUNDS, KILLS = examples(15), 3


def test_killed_at_any_moment_and_gone_on_with(server, adapters, tmp_path):
    out = tmp_path / "out"
    mapconv.convert_catalog(adapters, tmp_path / "expected")
    expected = contents(tmp_path / "expected")

    def start():
        process = server.Process(target=mapconv.convert_catalog, args=(adapters, out))
        process.start()
        return process

    whole = start()
    wait_for_its_lock(whole, out)
    began = time.perf_counter()
    whole.join()
    duration = time.perf_counter() - began
    assert contents(out) == expected
    moments, landed = random.Random(0), 0
    for number in range(ROUNDS):
        out = tmp_path / f"out-{number}"
        for _ in range(KILLS):
            victim = start()
            wait_for_its_lock(victim, out)
            victim.join(duration * moments.random())
            victim.kill()
            victim.join()
            landed += victim.exitcode == -signal.SIGKILL and (out / "ledger.jsonl").exists()
            assert_what_is_said_to_be_done_is(out, expected)
        result = mapconv.convert_catalog(adapters, out)
        assert (result.done, result.failed, result.left) == (6, 0, 0)
        assert contents(out) == expected
        assert ledger(out).keys() == {f"a{n:03d}" for n in range(6)}
    assert landed, "no kill fell into the work: the test proves nothing on this machine"


def wait_for_its_lock(process, out) -> None:
    """Return when the run has begun: what comes before is the start of a process."""
    while process.is_alive():
        with contextlib.suppress(OSError):
            if (out / ".mapconv" / "lock").read_text().startswith(f"{process.pid} on "):
                return
        time.sleep(0.0005)


def assert_what_is_said_to_be_done_is(out, expected) -> None:
    if not (out / "ledger.jsonl").exists():
        return
    text = (out / "ledger.jsonl").read_text()
    found = contents(out)
    for line in text.splitlines(keepends=True)[1:]:
        if line.endswith("\n"):
            folder = json.loads(line)["output"] + "/"
            of_entry = {name: data for name, data in expected.items() if name.startswith(folder)}
            assert of_entry
            assert of_entry.items() <= found.items()
