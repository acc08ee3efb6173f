"""transformers' loading of a folder that was loaded before: a copy, in a tenth of the time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.copies import Original

#: Models that are kept.
_KEPT = 8


@contextmanager
def loaded_once() -> Iterator[None]:
    """Read a folder once for each way of loading it, for as long as no file in it has changed."""
    load, kept = PreTrainedModel.from_pretrained.__func__, OrderedDict()

    def from_pretrained(cls: type, folder: Any, *arguments: Any, **settings: Any) -> Any:
        if arguments or settings.get("state_dict") is not None or folder is None or not Path(folder).is_dir():
            return load(cls, folder, *arguments, **settings)
        key = cls, _state(Path(folder)), *(f"{name}={value!r}" for name, value in sorted(settings.items()))
        if key not in kept:
            made = load(cls, folder, **settings)
            kept[key] = Original(made)
            if len(kept) > _KEPT:
                kept.popitem(last=False)
            return made
        kept.move_to_end(key)
        return kept[key].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
        yield


def _state(folder: Path) -> tuple[Any, ...]:
    found = [(path, path.stat()) for path in sorted(folder.iterdir())]
    return folder, *((path.name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found)
