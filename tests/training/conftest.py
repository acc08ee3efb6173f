"""A DoRA and its MAP form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mapconv
from tests.models import save_adapter

#: Short enough for a step to take some milliseconds; the default rates are those of real models, which start closer.
SETTINGS = {"sequence_length": 32, "held_out": 6, "batch_size": 4, "learning_rate": 8e-3}


@pytest.fixture(scope="session")
def source(models, base) -> Path:
    """A DoRA whose magnitudes are far enough from one gain that its refit leaves something to gain."""
    return save_adapter(base, models / "calibrate-dora", use_dora=True, seed=4)


@pytest.fixture(scope="session")
def closed_form(models, source) -> Path:
    mapconv.upgrade(source, models / "calibrate-map")
    return models / "calibrate-map"


@pytest.fixture
def calibrated(closed_form, source, text, tmp_path):
    """Calibrate to ``tmp_path/out`` with short sequences."""

    def calibrate(**settings):
        arguments = {"against": source, "data": text, "out": tmp_path / "out", **SETTINGS} | settings
        return mapconv.calibrate(arguments.pop("adapter", closed_form), **arguments)

    return calibrate


@pytest.fixture(scope="session")
def command_line(closed_form, source, text):
    """The words of a short run, before the ones that a test adds."""
    words = ["calibrate", closed_form, "--against", source, "--data", text, "--sequence-length", 32, "--held-out", 6]
    words += ["--lr", SETTINGS["learning_rate"]]
    return [*map(str, words)]


def read_record(folder: Path) -> dict:
    return json.loads((folder / "map_config.json").read_text())
