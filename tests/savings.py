"""What the whole suite spares itself, because no test is about it; those that are undo it or run in their own process.

The libraries are imported under ``while_importing``; the tests run under ``while_testing``.
"""

from __future__ import annotations

import os
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
from jinja2 import Environment


def without_authorities() -> None:
    """Each client of a Hub reads the certificates of all authorities, for 25 ms; no test speaks to anybody over TLS."""
    ssl.SSLContext.load_verify_locations = lambda *places, **more: None


@contextmanager
def while_importing() -> Iterator[None]:
    """bitsandbytes, which PEFT imports, has functions compiled that no processor's kernel of it calls.

    torch would load its whole compiler for that.
    """
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **settings: function)
        yield


@contextmanager
def while_testing() -> Iterator[None]:
    """Templates are compiled once, garbage is left for later, and disks are not waited for."""
    with pytest.MonkeyPatch.context() as patch:
        # PEFT and the Hub's client compile the same template of a model card for each adapter that is saved.
        patch.setattr(Environment, "compile", cache(Environment.compile))
        # What gives memory back between the stages of a command goes through all that the tests have loaded.
        for module in {"mapconv.runtime.memory", "accelerate.utils.memory"} & sys.modules.keys():
            patch.setattr(f"{module}.gc", SimpleNamespace(collect=lambda: 0))
        # No test cuts the power. Whether and when files are flushed, the tests of that see; forks wait for the disk.
        for name in ("fsync", "fdatasync"):
            if hasattr(os, name):
                patch.setattr(os, name, lambda descriptor: os.fstat(descriptor) and None)
        patch.setattr("mapconv.checkpoint.flushing._sync_file_range", None)
        yield
