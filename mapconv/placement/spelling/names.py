"""Every spelling of a base's modules, and which of them an adapter's key means.

A key such as ``lora_unet_down_blocks_0_attentions_0_proj_in`` does not say which of its underscores were dots, so it is
never taken apart: each module of the base is spelled in every way that is in use, and the key is looked up among those.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from mapconv.placement.spelling import clip, flux, unet
from mapconv.placement.spelling.location import Location, Reading, whole
from mapconv.spelling import Spelling

#: Where the modules of each name lie, and the name with its dots.
_Table = dict[str, dict[Location, str]]


@dataclass(frozen=True)
class Component:
    """One model of a base: what it may be in a pipeline, and what the names of its tensors begin with there.

    Without ``roles`` a lone model does not say what it is: it may then be whatever an adapter names.
    """

    roles: tuple[str, ...]
    prefix: str = ""


class SpelledNames:
    """The modules of a base by every name that an adapter may call them by.

    Args:
        shapes: of every tensor of the base.
        components: the models in it.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], components: tuple[Component, ...]) -> None:
        self.components = components
        self._exact: dict[Component, _Table] = {}
        self._flat: dict[Component, _Table] = {}
        for part, own in _divided(shapes, components).items():
            exact, flat = self._exact[part], self._flat[part] = defaultdict(dict), defaultdict(dict)
            for path, location in _spellings(own):
                exact[path].setdefault(location, path)
                flat[path.replace(".", "_")].setdefault(location, path)

    def has(self, spelling: Spelling) -> bool:
        """Whether the base has a model that the key may be for."""
        return bool(self._parts(spelling))

    def find(self, spelling: Spelling) -> list[Reading]:
        """All that the key may mean in the base; one with dots means what has its dots first."""
        found: dict[Location, str] = {}
        for part in self._parts(spelling):
            exact = {} if spelling.flat else self._exact[part].get(spelling.name, {})
            for location, path in (exact or self._flat[part].get(spelling.name.replace(".", "_"), {})).items():
                found.setdefault(_prefixed(location, part.prefix), part.prefix + path)
        return [Reading(path, location) for location, path in found.items()]

    def spelled(self) -> dict[Location, tuple[Component, list[str]]]:
        """The model of each module of the base and its names there, the base's own first."""
        found: dict[Location, tuple[Component, list[str]]] = {}
        for part, table in self._exact.items():
            for path, locations in table.items():
                for location in locations:
                    found.setdefault(_prefixed(location, part.prefix), (part, []))[1].append(path)
        return found

    def _parts(self, spelling: Spelling) -> list[Component]:
        return [part for part in self._exact if not part.roles or set(part.roles) & set(spelling.components)]


def _divided(
    shapes: Mapping[str, tuple[int, ...]], components: tuple[Component, ...]
) -> dict[Component, dict[str, tuple[int, ...]]]:
    """The tensors of each model under its own names; a tensor belongs to the longest prefix that it has."""
    longest_first = sorted(components, key=lambda part: -len(part.prefix))
    found: dict[Component, dict[str, tuple[int, ...]]] = {part: {} for part in components}
    for name, shape in shapes.items():
        part = next((part for part in longest_first if name.startswith(part.prefix)), None)
        if part is not None:
            found[part][name.removeprefix(part.prefix)] = shape
    return found


def _spellings(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Location]]:
    """(a module's path in some naming, where its weight lies) for every naming."""
    own = {name.removesuffix(".weight"): name for name in shapes if name.endswith(".weight")}
    for path, name in own.items():
        yield path, whole(name, shapes[name])
    for path, other in unet.other_names(own):
        yield other, whole(own[path], shapes[own[path]])
    yield from clip.text_names(shapes)
    yield from clip.open_clip_names(shapes)
    yield from flux.flux_names(shapes)


def _prefixed(location: Location, prefix: str) -> Location:
    return tuple(replace(segment, tensor=prefix + segment.tensor) for segment in location) if prefix else location
