"""A run's state in one file beside its output, from which ``--resume`` goes on to the same result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mapconv.checkpoint.exchange import hidden_sibling
from mapconv.checkpoint.staging import replaced_file
from mapconv.errors import DataError, OutputError

_VERSION = 1


def checkpoint_path(out: Path) -> Path:
    """Where the run that writes ``out`` keeps its state."""
    return hidden_sibling(out.resolve(), ".checkpoint")


class Checkpoint:
    """The file of one run, which is known by a fingerprint of all that decides its result."""

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self._path = path
        text = json.dumps({"version": _VERSION, **run}, sort_keys=True)
        self._run = dict(run)
        self._fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file, whole or not at all."""
        with replaced_file(self._path) as file:
            torch.save({"fingerprint": self._fingerprint, "run": self._run, "state": dict(state)}, file)

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The stored state; None without one.

        Raises:
            DataError: broken, or of a run with other options, data or adapters.
        """
        if not self._path.exists():
            return None
        again = f"run without --resume and with --force to start again, or delete {self._path}."
        try:
            stored = torch.load(self._path, map_location=device, weights_only=True)
            fingerprint, run, state = stored["fingerprint"], stored["run"], stored["state"]
        except OSError as error:
            raise OutputError(f"{self._path} cannot be read ({error.strerror}): {again}") from None
        except Exception as error:  # torch raises many kinds for a file that is none of its own
            raise DataError(f"{self._path} is not a mapconv checkpoint ({type(error).__name__}): {again}") from None
        if fingerprint != self._fingerprint:
            changed = [name for name in self._run if run.get(name) != self._run[name]]
            raise DataError(f"{self._path} is of a run with other {', '.join(changed) or 'settings'}: {again}")
        return state


def every(seconds: float, save: Callable[[], None]) -> Callable[[], None]:
    """A function that calls ``save`` when so much time has passed since it last did, or since now."""
    last = time.monotonic()

    def after_step() -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            save()
            last = time.monotonic()

    return after_step
