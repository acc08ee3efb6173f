"""Run a command as a process of its own, and report its wall time and peak memory as the kernel accounts them."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

#: The package measured is the one in this checkout, installed or not.
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


#: Starts a command, waits for it, and prints its seconds and peak kilobytes after its own output.
_STARTER = """
import os, subprocess, sys, time
started = time.perf_counter()
child = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(child.pid, 0)
print(time.perf_counter() - started, usage.ru_maxrss, usage.ru_utime + usage.ru_stime, flush=True)
os._exit(os.waitstatus_to_exitcode(status) & 255)
"""


@dataclass(frozen=True)
class Run:
    """One finished process: seconds of wall time, peak resident megabytes (10⁶ bytes), its stdout, and CPU seconds."""

    seconds: float
    megabytes: float
    output: str = ""
    cpu: float = 0.0


def run(*command: object, environment: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end; a failure stops the benchmark. ``environment``: None is our own, without the Hub.

    A small process in between starts it: the kernel counts what a process was before its exec as its own peak, and a
    benchmark that has just made a model is large.
    """
    environment = environment or os.environ | {"PYTHONPATH": ROOT, "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-S", "-c", _STARTER, *map(str, command)]
    finished = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment)
    output, _, figures = finished.stdout.rstrip("\n").rpartition("\n")
    if finished.returncode:
        sys.exit(f"{command} failed with {finished.returncode}")
    seconds, kilobytes, cpu = figures.split()
    return Run(float(seconds), int(kilobytes) * 1024 / 1e6, output, float(cpu))


def mapconv(*arguments: object) -> Run:
    return run(sys.executable, "-m", "mapconv", *arguments)


def python(code: str, *arguments: object) -> Run:
    return run(sys.executable, "-c", code, *arguments)


def median(runs: list[Run]) -> Run:
    """The median of each figure on its own."""
    return Run(
        statistics.median(r.seconds for r in runs),
        statistics.median(r.megabytes for r in runs),
        runs[-1].output,
        statistics.median(r.cpu for r in runs),
    )
