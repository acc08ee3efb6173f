"""The process behind ``ProcessEngine``: jobs in by stdin, outcomes out by stdout, one JSON object a line."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
from dataclasses import asdict

from mapconv.catalog.entries import Job
from mapconv.catalog.work import prepare, run_job

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main() -> None:
    """Serve until stdin ends. ``argv``: the number of cores, and the parent's process id."""
    cores, parent = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the whole group: the parent decides
    _die_with(parent)
    # The pipe is for outcomes alone: what a library prints goes where warnings go.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    gc.set_threshold(100_000, 50, 50)
    prepare(cores)
    answers.write(b"{}\n")
    answers.flush()
    for line in sys.stdin.buffer:
        outcome = run_job(Job(**json.loads(line)))
        answers.write(json.dumps(asdict(outcome)).encode() + b"\n")
        answers.flush()
    os._exit(0)  # taking torch down again takes a third of a second


def _die_with(parent: int) -> None:
    """Be killed when the parent dies, so that no orphan writes beside the next run."""
    if hasattr(signal, "SIGKILL") and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it died before that
