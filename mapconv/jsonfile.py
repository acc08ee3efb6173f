"""JSON as mapconv reads and prints it: objects only, one sentence for what is broken, and no NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mapconv.errors import MapconvError
from mapconv.files import SMALL, read_bytes


def read_object(
    path: Path, kind: type[MapconvError], *, advice: str = "download it again", limit: int = SMALL
) -> dict[str, Any]:
    """The table in a JSON file of at most ``limit`` bytes, which lies in its folder (``mapconv.files``).

    Raises:
        kind: no regular file of that folder, too long, not JSON, or not an object.
        FileNotFoundError: absent; what that means is the caller's to say.
    """
    content = read_bytes(path, kind, limit=limit)
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
