"""Run a command as a process of its own, and report its wall time and peak memory as the kernel accounts them."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

#: The package measured is the one in this checkout, installed or not.
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@dataclass(frozen=True)
class Run:
    """One finished process: seconds of wall time, peak resident megabytes (10⁶ bytes), and its stdout."""

    seconds: float
    megabytes: float
    output: str = ""


def run(*command: object) -> Run:
    """Run a command to its end; a failure stops the benchmark."""
    environment = os.environ | {"PYTHONPATH": ROOT, "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True, env=environment)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} failed with {process.returncode}")
    return Run(time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e6, output)


def mapconv(*arguments: object) -> Run:
    return run(sys.executable, "-m", "mapconv", *arguments)


def python(code: str, *arguments: object) -> Run:
    return run(sys.executable, "-c", code, *arguments)


def median(runs: list[Run]) -> Run:
    """The median of each figure on its own."""
    return Run(
        statistics.median(r.seconds for r in runs), statistics.median(r.megabytes for r in runs), runs[-1].output
    )
