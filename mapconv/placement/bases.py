"""The base that adapters are placed on, with its headers and its configuration as those of a plain model."""

from __future__ import annotations

from typing import Any

from mapconv.checkpoint.codecs import described_by, plain_view
from mapconv.checkpoint.index import Checkpoint
from mapconv.checkpoint.model_config import read_model_config
from mapconv.checkpoint.quantization import quantization_settings, without_quantization
from mapconv.checkpoint.reader import TensorReader
from mapconv.hub.ranges import prefetch


def plain_base(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, Any]]:
    """A base as if it were stored plain, and its ``config.json`` (empty where there is none).

    Raises:
        CheckpointError: a quantized base whose tensors are broken. UnsupportedError: one in an unknown storage.
    """
    try:
        require = None if checkpoint.source is None else checkpoint.source.require
        config = {} if checkpoint.is_file else read_model_config(checkpoint.folder, require)
    except FileNotFoundError:
        config = {}
    settings = quantization_settings(checkpoint.folder, config)
    prefetch(checkpoint.source, described_by(checkpoint, settings), quiet=True)
    with TensorReader(checkpoint.source) as reader:
        plain = plain_view(checkpoint, config, settings, reader)
    return plain, without_quantization(config)
