"""The base that an adapter is placed on as a live model: loaded from its files, or from the values of its codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mapconv.checkpoint.codecs import storages
from mapconv.checkpoint.index import Checkpoint, read_checkpoint
from mapconv.checkpoint.reader import TensorReader, block_elements, row_ranges
from mapconv.errors import CheckpointError, ResourceError
from mapconv.placement.adapters import FLOAT_NAMES, PlacedAdapter
from mapconv.placement.bases import plain_base
from mapconv.placement.model_class import causal_class
from mapconv.placement.skeleton import typed_model_config
from mapconv.placement.target_model import TargetModel, plain_target
from mapconv.runtime.devices import free_memory
from mapconv.runtime.models import load_model
from mapconv.runtime.progress import progress_bar


def load_base(placed: PlacedAdapter, *, dtype: str | None = None, device: Any, quiet: bool = True) -> Any:
    """The base in eval mode, as the adapter needs it; a quantized one as a model of plain weights.

    Args:
        placed: the adapter on its base.
        dtype: what to load the weights as; None: as the adapted ones are stored. What a quantized base's codes stand
            for is rounded to it once.
        device: where to.
        quiet: no bar, which shows how much memory a quantized base takes in plain weights.

    Raises:
        CheckpointError: transformers cannot load it, or had to invent weights that the base lacks.
        ResourceError: a quantized base whose plain weights do not fit in the free memory.
    """
    dtype = dtype or FLOAT_NAMES.get(placed.modules[0].weight.dtype, "float32")
    return load_target(
        placed.target, dtype=dtype, device=device, completed_later=bool(placed.adapter.whole), quiet=quiet
    )


def load_target(
    target: TargetModel, *, dtype: str, device: Any, completed_later: bool = False, quiet: bool = True
) -> Any:
    """As ``load_base``, without an adapter; ``completed_later`` accepts weights that the base lacks."""
    settings: dict[str, Any] = {}
    class_name, config = target.class_name, target.source_config
    if storages(target.checkpoint):
        # As it is in its files: a live model repeats layers by itself.
        checkpoint, _ = plain_base(read_checkpoint(target.folder, target.checkpoint.source))
        config = config or typed_model_config(target.folder)
        class_name = class_name or causal_class(config)
        if class_name is None:
            raise CheckpointError(f"{target.folder}: transformers has no causal language model for its model_type.")
        settings = {"state": _values(checkpoint, getattr(torch, dtype), quiet=quiet)}
    return load_model(
        target.folder,
        class_name,
        dtype=dtype,
        device=device,
        config=config,
        completed_later=completed_later,
        **settings,
    )


def load_merged(folder: Path, class_name: str | None, *, dtype: str, device: Any, quiet: bool = True) -> Any:
    """A merged model in eval mode; one that a merge left in its base's codes as a model of plain weights."""
    checkpoint, _ = plain_base(read_checkpoint(folder))
    target = replace(plain_target(checkpoint), class_name=class_name)
    return load_target(target, dtype=dtype, device=device, quiet=quiet)


def _values(checkpoint: Checkpoint, dtype: torch.dtype, *, quiet: bool) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, its floating-point ones in ``dtype``; row block by row block."""
    nbytes = sum(ref.numel for ref in checkpoint.tensors.values()) * dtype.itemsize
    free = free_memory()
    if free is not None and nbytes > free:
        raise ResourceError(
            f"{checkpoint.folder} in plain weights takes {nbytes / 1e9:.1f} GB of memory to run, and {free / 1e9:.1f} "
            "GB are free: use a larger machine, or a --dtype of 16 bits where the command has one."
        )
    state = {}
    with TensorReader() as reader, progress_bar(nbytes, "dequantizing into memory", quiet=quiet) as advance:
        for name, ref in checkpoint.tensors.items():
            buffer = torch.empty(8 * block_elements(ref), dtype=torch.uint8)
            values = None
            for start, stop in row_ranges(ref):
                block = reader.read_range(ref, start, stop, buffer)
                if values is None:
                    values = torch.empty(ref.numel, dtype=dtype if block.is_floating_point() else block.dtype)
                values[start:stop] = block
                advance((stop - start) * dtype.itemsize)
            state[name] = torch.empty(ref.shape) if values is None else values.view(ref.shape)
    return state
