"""Which of the image dialects a file is in, and the refusal of one that is in two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mapconv.adapter import Adapter
from mapconv.checkpoint.headers import TensorFile
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
                if not dialect.mixes:
                    self._refuse_mixture(dialect, found.header)
                return dialect.read(found, allow_pickle=allow_pickle)
        return signed[0].read(found, allow_pickle=allow_pickle)

    def _refuse_mixture(self, dialect: ImageDialect, file: TensorFile) -> None:
        """One trainer writes all factors alike; a dialect of many endings must not hide that two were joined."""
        for part in ("down", "up"):
            endings: dict[str, str] = {}
            for ref in file.tensors:
                split = dialect.keys.split(ref.name)
                if split is not None and dialect.keys.endings[split[2]] == part:
                    endings.setdefault(split[2], ref.name)
            if len(endings) > 1:
                named = " and ".join(f"{self._first(key).name} ({key})" for key in list(endings.values())[:2])
                raise UnsupportedError(
                    f"{file.path} holds the keys of two dialects, {named}: give each as a file of its own."
                )

    def _first(self, key: str) -> ImageDialect:
        """The first dialect that has a key."""
        return next(dialect for dialect in self.dialects if dialect.keys.split(key) is not None)
