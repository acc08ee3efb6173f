"""The training that ends a rebase: on the other base, towards the source on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mapconv.placement.adapters import PlacedAdapter
from mapconv.refit.evidence import Text
from mapconv.runtime.models import load_tokenizer
from mapconv.training.calibration import CalibrationOptions, CalibrationReport, calibrate_folder
from mapconv.training.data import TrainingData
from mapconv.training.models import target_classes
from mapconv.training.processes import Processes

#: In the unit of ``training.calibration.DEFAULT_RATES``; a rebase leaves far more to gain than a refit on one base.
#: Found on four layers of SmolLM2 at 4 bits with its LoRA rebased, from whose held-out KL of 0.0340 steps of 4 × 64
#: tokens led to 0.0327 (20 steps at 2e-5), 0.0278 (20 at 2e-4), and 0.0287 (10 at 6e-4, after a first step away).
LEARNING_RATE = 2e-4


def calibrate_rebased(
    trained: PlacedAdapter,
    served: PlacedAdapter,
    text: Text,
    staging: Path,
    training: dict[str, Any],
    device: torch.device,
    allow_pickle: bool,
    *,
    quiet: bool,
) -> CalibrationReport:
    """Train the factors of the staged result in place, on the file or the samples that it was fitted on.

    Both bases are in memory, in float32.

    Args:
        trained, served: the source on its own base, and on the one that the result is for.
        text: what to train on; its held-out part chooses the best step.
        staging: the result, a MAP directory.
        training: ``steps``, ``seed`` and ``hold_gain`` of the options.
        device: where to train.
        allow_pickle: read the source's weights from a ``.bin`` file.
        quiet: no progress bar.

    Raises:
        MapconvError: of the kind that fits; the result is then as it was.
    """
    padding = load_tokenizer(trained.target.tokenizer).pad_token_id
    data = TrainingData(text.train, text.held_out, target_classes(trained.target), padding)
    length = text.train.input_ids.shape[1]
    options = CalibrationOptions(train="all", sequence_length=length, learning_rate=LEARNING_RATE, **training)
    report = calibrate_folder(
        staging, trained, served, data, options, Processes(device), into=staging, allow_pickle=allow_pickle, quiet=quiet
    )
    assert report is not None  # this is the only process
    return report
