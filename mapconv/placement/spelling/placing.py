"""Put an adapter whose keys only the base's names can resolve on that base: all of its modules at once, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from mapconv.adapter import Adapter, Addition, Module, TensorRef
from mapconv.checkpoint.derived import rows_of
from mapconv.errors import PlacementError, UnsupportedError
from mapconv.placement.agreement import require_bijection
from mapconv.placement.by_name import misfit_report, nearest
from mapconv.placement.spelling.components import spelling_of
from mapconv.placement.spelling.location import Location, Reading, Segment
from mapconv.placement.spelling.names import SpelledNames
from mapconv.placement.weights import Piece, PlacedModule, WeightView
from mapconv.spelling import Spelling


class SpelledPlacement:
    """One adapter's names in a base, and its modules on the base's tensors.

    With ``keep`` each module stays one under its own path, as the record beside a MAP adapter has it; without it, it
    gets the base's path, and one that lies on several tensors comes apart into one for each, which is how it loads.
    """

    def __init__(
        self, adapter: Adapter, tensors: Mapping[str, TensorRef], names: SpelledNames, *, keep: bool = False
    ) -> None:
        self.adapter, self.tensors, self._names, self._keep = adapter, tensors, names, keep

    def stored_name(self, parameter: str) -> str:
        """What the base calls a parameter of the adapter; a name that it has not got where it has none."""
        path, _, leaf = parameter.rpartition(".")
        found = self._names.find(spelling_of(path))
        return parameter if len(found) != 1 else self._sibling(found[0].location, leaf) or parameter

    def additions(self) -> Iterator[tuple[Addition, str]]:
        """Every addition, and the stored tensor that it is for.

        Raises:
            PlacementError: one that has no tensor of its shape, or several.
        """
        misfits = []
        for item in self.adapter.additions:
            found = [self._sibling(reading.location, item.leaf) for reading in self._names.find(item.spelling)]
            names = [name for name in found if name and self.tensors[name].shape == item.tensor.shape]
            if len(names) == 1:
                yield item, names[0]
            else:
                shape = list(item.tensor.shape)
                misfits.append(f"{item.tensor.name}: {' and '.join(names) or 'nothing'} of shape {shape} is there")
        if misfits:
            raise PlacementError(misfit_report(misfits, len(self.adapter.modules) + len(self.adapter.additions)))

    def _sibling(self, location: Location, leaf: str) -> str | None:
        """The tensor beside the weight of a module that is one tensor."""
        name = f"{location[0].tensor.removesuffix('.weight')}.{leaf}"
        return name if len(location) == 1 and name in self.tensors else None

    def modules(self) -> tuple[PlacedModule, ...]:
        """Every module on its tensor.

        Raises:
            PlacementError: modules for a model that the base has not got, without a tensor that they fit, or with more
                than one that their keys may mean.
        """
        self._require_models()
        placed: list[PlacedModule] = []
        misfits = []
        for module in self.adapter.modules:
            _require_axis(module)
            found = self._names.find(_spelling(module))
            fits = [reading for reading in found if self._fits(module, reading.location)]
            if len(fits) == 1:
                placed += self._placed(module, fits[0])
            else:
                misfits.append(self._misfit(module, fits, found))
        if misfits:
            raise PlacementError(misfit_report(misfits, len(self.adapter.modules)))
        require_bijection(placed)
        return tuple(placed)

    def _require_models(self) -> None:
        spellings = [(module.path, _spelling(module)) for module in self.adapter.modules]
        spellings += [(item.path, item.spelling) for item in self.adapter.additions]
        for path, spelling in spellings:
            if not self._names.has(spelling):
                wanted = " or ".join(spelling.components)
                own = ", ".join(" or ".join(part.roles) for part in self._names.components)
                raise PlacementError(
                    f"{self.adapter.path} adapts {wanted} ({path}), but the base has only {own}: give a base "
                    "that has it with --base, such as the folder of a whole pipeline."
                )

    def _fits(self, module: Module, location: Location) -> bool:
        height, width = module.weight_shape
        if sum(segment.rows for segment in location) != height:
            return False
        kernel = module.lora_A.shape[2:]
        for segment in location:
            shape = self.tensors[segment.tensor].shape
            if segment.transposed:
                if shape != (width, height):
                    return False
            # Trainers write the factors of a 1×1 convolution with its kernel or without it.
            elif _width(shape) != width or (kernel and shape[2:] not in (kernel, ())) or len(shape) < 2:
                return False
        return True

    def _placed(self, module: Module, reading: Reading) -> list[PlacedModule]:
        location = reading.location
        if self._keep:
            return [self._on(module, location, module.path)]
        if len(location) == 1:
            path = location[0].tensor.removesuffix(".weight") if self._is_whole(location[0]) else reading.path
            return [self._on(module, location, path)]
        placed, start = [], 0
        for segment in location:
            part = _rows_of(module, start, segment.rows)
            placed.append(self._on(part, (segment,), segment.tensor.removesuffix(".weight")))
            start += segment.rows
        return placed

    def _on(self, module: Module, location: Location, path: str) -> PlacedModule:
        """A module on the rows of some tensors that make its weight."""
        first = self.tensors[location[0].tensor]
        height, width = module.weight_shape
        if not location[0].transposed:
            A = replace(module.lora_A, shape=(module.rank, *first.shape[1:]))
            B = replace(module.lora_B, shape=(height, module.rank, *(1 for _ in first.shape[2:])))
            module = replace(module, lora_A=A, lora_B=B)
        pieces, start = [], 0
        for segment in location:
            ref = self.tensors[segment.tensor]
            stop = start + segment.rows
            pieces.append(Piece(ref, start, stop, offset=segment.offset, transposed=segment.transposed))
            start = stop
        view = WeightView((height, width), tuple(pieces))
        return PlacedModule(replace(module, path=path, spelling=None), view, first.name, module.rank, module.scaling)

    def _is_whole(self, segment: Segment) -> bool:
        shape = self.tensors[segment.tensor].shape
        return segment.rows == (shape[1] if segment.transposed else shape[0])

    def _misfit(self, module: Module, fits: list[Reading], found: list[Reading]) -> str:
        if fits:
            return f"{module.path}: it may mean {' and '.join(item.path for item in fits)}, and fits each of them"
        if found:
            shapes = " and ".join(
                f"{segment.tensor} is {list(self.tensors[segment.tensor].shape)}"
                for item in found
                for segment in item.location
            )
            return f"{module.path}: {shapes}, the adapter expects {list(module.weight_shape)}"
        return f"{module.path}: the base has no module of that name{nearest(_spelling(module).name, self.tensors)}"


def _require_axis(module: Module) -> None:
    if module.magnitude is not None and module.rescaling.axis is None:
        raise UnsupportedError(
            f"{module.magnitude.file}: {module.magnitude.name} {list(module.magnitude.shape)} of a weight "
            f"{list(module.weight_shape)} does not say whether its magnitudes are those of outputs or of inputs: give "
            "--dora-axis out or --dora-axis in, as the trainer had it."
        )


def _spelling(module: Module) -> Spelling:
    assert module.spelling is not None  # of an adapter in such a dialect
    return module.spelling


def _width(shape: tuple[int, ...]) -> int:
    width = 1
    for size in shape[1:]:
        width *= size
    return width


def _rows_of(module: Module, start: int, rows: int) -> Module:
    """The part of a module that adapts some rows of its weight: those of its update, and its magnitudes by rows."""
    height, _ = module.weight_shape
    if rows == height:
        return module
    stop, magnitude = start + rows, module.magnitude
    if magnitude is not None:
        if module.rescaling.axis == "in":
            raise UnsupportedError(
                f"{module.path} is a DoRA with one magnitude for each input of a weight that the base has in pieces, "
                "whose norms are those of all pieces together: give a base that has the weight whole."
            )
        magnitude = rows_of(magnitude, start, stop)
    delta = None if module.delta is None else rows_of(module.delta, start, stop)
    return replace(module, lora_B=rows_of(module.lora_B, start, stop), delta=delta, magnitude=magnitude)
