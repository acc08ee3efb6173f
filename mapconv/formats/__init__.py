"""Dialects of adapter files: bytes on disk <-> ``Adapter``. A new dialect is one new file and one line here."""

from __future__ import annotations

from pathlib import Path

from mapconv.adapter import Adapter
from mapconv.checkpoint.filenames import MODEL_CONFIG
from mapconv.checkpoint.sidecars import check_folder
from mapconv.errors import AdapterError
from mapconv.formats import gguf, litgpt, lomap, mapdir, mlx, nemo, peft, peft_methods, torchtune
from mapconv.formats.base import CONFIG_FILE, Dialect, Found
from mapconv.formats.foreign import FOREIGN
from mapconv.formats.image import IMAGE_FILES

#: Of files that are an adapter, or the weights of one.
_SINGLE_FILES = (".safetensors", ".gguf", ".pt", ".lora", ".nemo")
#: In order of recognition: a MAP directory and MAP's authors' one are PEFT directories as well, and MAP on another
#: method has scalars of the names that the authors' have.
DIALECTS: tuple[Dialect, ...] = (
    mapdir.MapDirectory(),
    torchtune.TorchtuneAdapter(),
    litgpt.LitgptAdapter(),
    nemo.NemoAdapter(),
    peft_methods.PeftMethodDirectory(),
    lomap.LomapDirectory(),
    peft.PeftDirectory(),
    mlx.MlxAdapter(),
    gguf.GgufLora(),
    FOREIGN[0],
    IMAGE_FILES,
    *FOREIGN[1:],
)


def read_adapter(path: Path, *, allow_pickle: bool = False) -> Adapter:
    """Read the adapter at ``path`` in whichever dialect it is written; tensors' values are not read.

    Raises:
        AdapterError: nothing there, no dialect's, or broken; UnsupportedError: sound, but with a refused feature.
    """
    check_folder(path, AdapterError)
    if not path.exists():
        raise AdapterError(f"{path} does not exist: give the adapter's folder or file.")
    if path.is_file() and path.suffix not in _SINGLE_FILES:
        raise AdapterError(f"{path} is a file: give the folder that holds it and its {CONFIG_FILE}.")
    found = Found(path)
    dialect = next((dialect for dialect in DIALECTS if dialect.recognise(found)), None)
    if dialect is not None:
        return dialect.read(found, allow_pickle=allow_pickle)
    if found.config is not None:
        return peft.PeftDirectory().read(found, allow_pickle=allow_pickle)  # says what the configuration lacks
    raise AdapterError(_instead_of_an_adapter(found))


def _instead_of_an_adapter(found: Found) -> str:
    """What a path without an adapter's configuration is, where that can be told."""
    path, header = found.path, found.header
    inside = [child.name for child in path.glob("*") if (child / CONFIG_FILE).is_file()]
    if inside:
        names = sorted(inside, key=lambda name: (len(name), name))  # checkpoint-90 before checkpoint-100
        named = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return f"{path} is not an adapter folder, but holds some: give one of them ({named}), as {path / names[-1]}."
    if (path / MODEL_CONFIG).is_file():
        return (
            f"{path} is a full model ({MODEL_CONFIG} and no {CONFIG_FILE}), not an adapter: give the folder of a "
            "LoRA or DoRA adapter, or make one of a finetuned model with `mapconv extract`."
        )
    if header is not None and header.tensors:
        return (
            f"{header.path} holds no adapter, but tensors such as {header.tensors[0].name}: give the adapter's folder "
            "or file."
        )
    return f"{path} has no {CONFIG_FILE}: it is not an adapter folder."
