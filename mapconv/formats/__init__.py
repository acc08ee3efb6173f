"""Dialects of adapter files: bytes on disk <-> ``Adapter``. A new dialect is one new file and one line here."""

from __future__ import annotations

from pathlib import Path

from mapconv.adapter import Adapter
from mapconv.checkpoint.sidecars import check_folder
from mapconv.errors import AdapterError
from mapconv.formats import mapdir, peft
from mapconv.formats.base import CONFIG_FILE, Dialect, Found
from mapconv.formats.foreign import FOREIGN

#: In order of recognition: a MAP directory is a PEFT directory as well.
DIALECTS: tuple[Dialect, ...] = (mapdir.MapDirectory(), peft.PeftDirectory(), *FOREIGN)


def read_adapter(path: Path, *, allow_pickle: bool = False) -> Adapter:
    """Read the adapter at ``path`` in whichever dialect it is written; tensors' values are not read.

    Raises:
        AdapterError: nothing there, no dialect's, or broken; UnsupportedError: sound, but with a refused feature.
    """
    check_folder(path, AdapterError)
    if not path.exists():
        raise AdapterError(f"{path} does not exist: give the adapter's folder.")
    if path.is_file() and path.suffix != ".safetensors":
        raise AdapterError(f"{path} is a file: give the folder that holds it and its {CONFIG_FILE}.")
    found = Found(path)
    dialect = next((dialect for dialect in DIALECTS if dialect.recognise(found)), None)
    if dialect is not None:
        return dialect.read(found, allow_pickle=allow_pickle)
    if found.config is not None:
        return peft.PeftDirectory().read(found, allow_pickle=allow_pickle)  # says what the configuration lacks
    if found.header is not None and found.header.tensors:
        raise AdapterError(
            f"{found.header.path} holds no adapter, but tensors such as {found.header.tensors[0].name}: give the "
            "adapter's folder."
        )
    raise AdapterError(f"{path} has no {CONFIG_FILE}: it is not an adapter folder.")
