"""JSON as mapconv reads and prints it: objects only, one sentence for what is broken, and no NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mapconv.errors import MapconvError

#: How the text begins that Git-LFS puts in a file's place until the file is pulled.
LFS_POINTER = b"version https://git-lfs"


def read_object(path: Path, kind: type[MapconvError], *, advice: str = "download it again") -> dict[str, Any]:
    """The table in a JSON file.

    Raises:
        kind: not JSON, or not an object. FileNotFoundError: absent; what that means is the caller's to say.
    """
    content = path.read_bytes()
    if content.startswith(LFS_POINTER):
        raise kind(f"{path} is a Git-LFS pointer, not the file itself: run `git lfs pull` in its folder.")
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise kind(f"{path} is not JSON ({error}): {advice}.") from None
    if not isinstance(table, dict):
        raise kind(f"{path} holds {type(table).__name__}, expected an object: {advice}.")
    return table


def finite(value: Any) -> Any:
    """``value`` with null in place of every number that is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
