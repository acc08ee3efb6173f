"""The 16-bit model that a quantized one was made from: what its card says, where a user asks for it by ``original``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mapconv.checkpoint.gguf.header import is_gguf
from mapconv.checkpoint.quantization import quantization_settings
from mapconv.checkpoint.sidecars import MODEL_CONFIG
from mapconv.errors import CheckpointError
from mapconv.jsonfile import read_object

CARD_FILE = "README.md"
#: What ``--base`` may say in place of a model.
ORIGINAL = "original"


def original_of(folder: Path, name: str) -> str:
    """What the card in ``folder`` names as the model that ``name`` is a quantized copy of.

    Never guessed from the name: a card that says nothing, or names several, is an error.

    Raises:
        CheckpointError: no such card, or a model that is no quantized copy.
    """
    path = (folder.parent if is_gguf(folder) else folder) / CARD_FILE
    table = _card(path) if path.is_file() else {}
    base, relation = table.get("base_model"), table.get("base_model_relation")
    if isinstance(base, list) and len(base) == 1:
        base = base[0]
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"the model card of {name} does not say which model it is a quantized copy of (base_model): name that "
            "model itself."
        )
    if relation != "quantized" and (relation is not None or not _is_quantized(folder)):
        raise CheckpointError(
            f"the model card of {name} names {base}, but not as the model that it is a quantized copy of "
            f"(base_model_relation is {relation!r}): name the base model itself."
        )
    return base


def _card(path: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        table = metadata_load(path)
    except Exception as error:  # whatever the YAML library raises on a broken card
        raise CheckpointError(f"{path} has a header that cannot be read ({type(error).__name__}).") from None
    return table if isinstance(table, dict) else {}


def _is_quantized(folder: Path) -> bool:
    path = folder / MODEL_CONFIG
    if is_gguf(folder):
        return True
    return path.is_file() and quantization_settings(folder, read_object(path, CheckpointError)) is not None
