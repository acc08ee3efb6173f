"""What a bug report needs: versions, devices and cache folders; no token and nothing else of the environment."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from mapconv.refit.norms import cache_folder
from mapconv.runtime.threads import core_count
from mapconv.version import __version__

_PACKAGES = ("torch", "safetensors", "huggingface-hub", "peft", "transformers", "numpy", "click")
_OPTIONAL = ("accelerate", "ray", "pyarrow", "matplotlib")


def environment() -> dict[str, str]:
    """A table for people and for JSON."""
    from huggingface_hub import constants

    norms = cache_folder()
    table = {"mapconv": __version__, "Python": f"{platform.python_version()} ({sys.executable})"}
    table |= {"platform": platform.platform(), "cores": str(core_count())}
    table |= {name: _version(name) or "not installed" for name in _PACKAGES}
    table |= {name: found for name in _OPTIONAL if (found := _version(name)) is not None}
    table["devices"] = ", ".join(["cpu", *map(_cuda_name, range(torch.cuda.device_count()))])
    table["CUDA"] = torch.version.cuda or "not in this build of torch"
    table["cached norms"] = "off" if norms is None else str(norms)
    table["Hub cache"] = constants.HF_HUB_CACHE
    table["Hub"] = f"{constants.ENDPOINT}{', offline' if constants.HF_HUB_OFFLINE else ''}"
    names = ("MAPCONV_CACHE", "MAPCONV_DEBUG", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return table | {name: os.environ[name] for name in names if name in os.environ}


def _cuda_name(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"cuda:{index} ({properties.name}, {properties.total_memory / 1e9:.0f} GB)"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
