"""Every spelling of a base's modules, and which of them an adapter's key means.

A key such as ``lora_unet_down_blocks_0_attentions_0_proj_in`` does not say which of its underscores were dots, so it is
never taken apart: each module of the base is spelled in every way that is in use, and the key is looked up among those.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mapconv.adapter import Spelling


@dataclass(frozen=True)
class Component:
    """One model of a base: what it is in a pipeline, and what the names of its tensors begin with there.

    ``role`` is None where a lone model does not say what it is: it may then be whatever an adapter names.
    """

    role: str | None
    prefix: str = ""


class SpelledNames:
    """The modules of a base by every name that an adapter may call them by."""

    def __init__(self, tensors: Iterable[str], components: Iterable[Component]) -> None:
        self.components = tuple(components)
        longest_first = sorted(self.components, key=lambda component: -len(component.prefix))
        self._exact: dict[Component, dict[str, set[str]]] = {part: defaultdict(set) for part in self.components}
        self._flat: dict[Component, dict[str, set[str]]] = {part: defaultdict(set) for part in self.components}
        for name in tensors:
            path, _, leaf = name.rpartition(".")
            part = next((part for part in longest_first if path.startswith(part.prefix)), None)
            if part is None or leaf != "weight":
                continue
            for spelled in _spellings(path.removeprefix(part.prefix)):
                self._exact[part][spelled].add(path)
                self._flat[part][spelled.replace(".", "_")].add(path)

    def has(self, spelling: Spelling) -> bool:
        """Whether the base has a model that the key may be for."""
        return bool(self._parts(spelling))

    def find(self, spelling: Spelling) -> list[str]:
        """The paths of all modules of the base that the key may mean; one with dots means those with its dots first."""
        found: set[str] = set()
        for part in self._parts(spelling):
            exact = () if spelling.flat else self._exact[part].get(spelling.name, ())
            found.update(exact or self._flat[part].get(spelling.name.replace(".", "_"), ()))
        return sorted(found)

    def _parts(self, spelling: Spelling) -> list[Component]:
        return [part for part in self.components if part.role is None or part.role in spelling.components]


def _spellings(path: str) -> set[str]:
    return {path}


def components_of(config: Mapping[str, object]) -> tuple[Component, ...]:
    """The one model of a base that is no pipeline, by its own configuration."""
    if "_class_name" in config:
        return (Component("denoiser"),)
    return (Component(None),)
