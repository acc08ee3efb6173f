"""How the keys of an image adapter come apart: a prefix for the model, a module's name, an ending for the part."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mapconv.adapter import TensorRef
from mapconv.spelling import Spelling

DENOISER = ("denoiser",)


@dataclass(frozen=True)
class Prefix:
    """What a module's key begins with, the models of a pipeline that it may stand for, and how names go on.

    ``kept``: it is the beginning of the module's name itself.
    """

    text: str
    components: tuple[str, ...]
    flat: bool = False
    kept: bool = False


@dataclass(frozen=True)
class KeyParts:
    """The tensors of one module by the part that they are, under the key that all of them begin with."""

    path: str
    spelling: Spelling
    tensors: Mapping[str, TensorRef]


@dataclass(frozen=True)
class KeyTable:
    """The prefixes and endings of one dialect.

    ``endings`` maps each to the part's one name; ``renames`` are expressions that a module's name is rewritten by, for
    a dialect that has other names than any base.
    """

    prefixes: Sequence[Prefix]
    endings: Mapping[str, str]
    renames: Sequence[tuple[str, str]] = ()

    @cached_property
    def _ending(self) -> re.Pattern[str]:
        longest_first = sorted(self.endings, key=lambda text: -len(text))
        return re.compile(f"(?P<path>.+?)(?P<ending>{'|'.join(map(re.escape, longest_first))})")

    def split(self, key: str) -> tuple[str, Spelling, str] | None:
        """(module's key, its name, the ending) of one tensor's key; None where the dialect has no such key."""
        found = self._ending.fullmatch(key)
        if found is None:
            return None
        path = found["path"]
        for prefix in self.prefixes:
            name = path if prefix.kept else path.removeprefix(prefix.text)
            if path.startswith(prefix.text) and name and not (prefix.flat and "." in name):
                return path, Spelling(prefix.components, self._renamed(name), prefix.flat), found["ending"]
        return None

    def gather(self, refs: Iterable[TensorRef]) -> tuple[list[KeyParts], list[TensorRef]]:
        """Every module's tensors in the order of the file, and the tensors whose keys are none of the dialect's."""
        tensors: dict[str, dict[str, TensorRef]] = defaultdict(dict)
        spellings: dict[str, Spelling] = {}
        foreign: list[TensorRef] = []
        for ref in refs:
            split = self.split(ref.name)
            if split is None or self.endings[split[2]] in tensors[split[0]]:
                foreign.append(ref)
                continue
            path, spellings[path], ending = split
            tensors[path][self.endings[ending]] = ref
        return [KeyParts(path, spellings[path], parts) for path, parts in tensors.items() if parts], foreign

    def _renamed(self, name: str) -> str:
        for pattern, new in self.renames:
            name = re.sub(pattern, new, name)
        return name
