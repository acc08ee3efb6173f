"""PEFT's layers around base layers, in a model that holds them and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from mapconv.runtime.models import quiet_libraries

#: What PEFT calls the one adapter of each of these models.
ADAPTER = "default"


def inject(bases: Mapping[str, torch.nn.Module], config: Any, *, without_values: bool = False) -> Any:
    """A PeftModel around base layers, in a skeleton that holds them at their paths and nothing else."""
    from peft import PeftModel

    root = torch.nn.Module()
    for path, base in bases.items():
        parent = root
        *parents, name = path.split(".")
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, torch.nn.Module())
            child = parent._modules[part]
            assert child is not None
            parent = child
        parent.add_module(name, base)
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel(root, config, adapter_name=ADAPTER, low_cpu_mem_usage=without_values).eval()
