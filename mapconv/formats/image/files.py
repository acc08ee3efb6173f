"""Which of the image dialects a file is in, and the refusal of one that is in two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mapconv.adapter import Adapter
from mapconv.errors import UnsupportedError
from mapconv.formats.base import Found
from mapconv.formats.image.reading import ImageDialect


@dataclass(frozen=True)
class ImageFiles:
    """All image dialects as one: the first that has every key of a file is the file's."""

    dialects: Sequence[ImageDialect]

    def recognise(self, found: Found) -> bool:
        # A configuration beside the weights is of a dialect that has one.
        return found.config is None and any(dialect.recognise(found) for dialect in self.dialects)

    def read(self, found: Found, *, allow_pickle: bool = False) -> Adapter:
        assert found.header is not None  # it was recognised by its keys
        signed = [dialect for dialect in self.dialects if dialect.recognise(found)]
        keys = [ref.name for ref in found.header.tensors]
        for dialect in signed:
            if all(dialect.keys.split(key) is not None for key in keys):
                return dialect.read(found, allow_pickle=allow_pickle)
        first = signed[0]
        foreign = [key for key in keys if first.keys.split(key) is None]
        for other in signed[1:]:
            theirs = next((key for key in foreign if other.keys.split(key) is not None), None)
            if theirs is not None:
                own = next(key for key in keys if first.keys.split(key) is not None)
                raise UnsupportedError(
                    f"{found.header.path} holds the keys of two dialects, {first.name} ({own}) and {other.name} "
                    f"({theirs}): give each as a file of its own."
                )
        return first.read(found, allow_pickle=allow_pickle)
