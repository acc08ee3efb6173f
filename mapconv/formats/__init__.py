"""Dialects of adapter files: bytes on disk <-> ``Adapter``. A new dialect is one new file and one line here."""

from __future__ import annotations

from pathlib import Path

from mapconv.adapter import Adapter
from mapconv.checkpoint.sidecars import MODEL_CONFIG, check_folder
from mapconv.errors import AdapterError
from mapconv.formats import mapdir, peft
from mapconv.formats.base import Dialect

#: In order of detection: a MAP directory is a PEFT directory as well.
DIALECTS: tuple[Dialect, ...] = (mapdir.MapDirectory(), peft.PeftDirectory())


def read_adapter(path: Path, *, allow_pickle: bool = False) -> Adapter:
    """Read the adapter at ``path`` in whichever dialect it is written; tensors' values are not read.

    Raises:
        AdapterError: nothing there, no dialect's, or broken; UnsupportedError: sound, but with a refused feature.
    """
    check_folder(path, AdapterError)
    for dialect in DIALECTS:
        if dialect.detect(path):
            return dialect.read(path, allow_pickle=allow_pickle)
    if not path.exists():
        raise AdapterError(f"{path} does not exist: give the adapter's folder.")
    if path.is_file():
        raise AdapterError(f"{path} is a file: give the folder that holds it and its {peft.CONFIG_FILE}.")
    raise AdapterError(_instead_of_an_adapter(path))


def _instead_of_an_adapter(path: Path) -> str:
    """What a folder without an adapter's configuration is, where that can be told."""
    inside = [child.name for child in path.iterdir() if (child / peft.CONFIG_FILE).is_file()]
    if inside:
        names = sorted(inside, key=lambda name: (len(name), name))  # checkpoint-90 before checkpoint-100
        named = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return f"{path} is not an adapter folder, but holds some: give one of them ({named}), as {path / names[-1]}."
    if (path / MODEL_CONFIG).is_file():
        return (
            f"{path} is a full model ({MODEL_CONFIG} and no {peft.CONFIG_FILE}), not an adapter: give the folder of a "
            "LoRA or DoRA adapter."
        )
    return f"{path} has no {peft.CONFIG_FILE}: it is not an adapter folder."
