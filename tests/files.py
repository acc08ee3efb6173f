"""Files under a test's hand: safetensors taken apart and put together, edited configurations, folder listings."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything under ``folder``, hidden entries included."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size if path.is_file() else -1, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON object; the value ``...`` removes one."""
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Load a safetensors file, change the table of tensors in place, and save it."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path: Path, header: Any, data: bytes) -> None:
    """A safetensors file with any header at all: JSON text as it is, or a value to encode."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder, read by the safetensors library."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def cached(folder: Path, repository: Path) -> Path:
    """A snapshot of ``folder`` as in the Hub's cache: links to blobs, in ``repository`` (``models--owner--name``)."""
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, repository / "blobs")
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    return snapshot
