"""Where the parameters of a live model lie in stored tensors, however either side spells, stacks or fuses them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from mapconv.adapter import TensorRef
from mapconv.errors import PlacementError
from mapconv.placement.numbering import Region
from mapconv.placement.skeleton import Kind
from mapconv.placement.weights import Piece, WeightView


class StoredParameters:
    """Stored tensors by the live parameter that they belong to."""

    def __init__(self, located: Mapping[str, Region], tensors: Mapping[str, TensorRef]) -> None:
        self._by_parameter: dict[str, list[tuple[Region, TensorRef]]] = defaultdict(list)
        self.tensor_names = dict.fromkeys(tensors)
        self._by_matrix: dict[tuple[str, int], list[tuple[Region, TensorRef]]] = defaultdict(list)
        for name, region in located.items():
            self._by_parameter[region.parameter].append((region, tensors[name]))
            if region.index is not None:
                self._by_matrix[region.parameter, region.index].append((region, tensors[name]))

    def holds(self, parameter: str) -> bool:
        return parameter in self._by_parameter

    def names(self, parameter: str) -> list[str]:
        """The stored tensors that make up a parameter."""
        return [ref.name for _, ref in self._by_parameter.get(parameter, ())]

    def is_whole(self, parameter: str) -> bool:
        """Whether one stored tensor holds the parameter as it is."""
        entries = self._by_parameter.get(parameter, [])
        return len(entries) == 1 and entries[0][0].index is None and entries[0][0].plain

    def is_plain(self, parameter: str) -> bool:
        """Whether its stored tensors hold the parameter and nothing else, in the model's own order."""
        return all(region.plain for region, _ in self._by_parameter.get(parameter, ()))

    def weight(self, parameter: str, kind: Kind) -> WeightView:
        """A parameter that is one weight."""
        ref = self.single(parameter)
        if kind in ("transposed", "embedding"):
            height, width = ref.shape
            return WeightView((width, height), (Piece(ref, 0, width, transposed=True),))
        height, width = ref.shape[0], math.prod(ref.shape[1:])
        return WeightView((height, width), (Piece(ref, 0, height),))

    def expert(self, parameter: str, index: int, *, transposed: bool) -> WeightView:
        """One matrix of a stacked parameter, with all its parts."""
        parts = sorted(self._by_matrix.get((parameter, index), ()), key=lambda entry: entry[0].part)
        if not parts:
            return self._slice(self.single(parameter), index, 0, 1, transposed=transposed)
        if len(parts) != parts[0][0].parts or not all(region.plain for region, _ in parts):
            raise PlacementError(
                f"expert {index} of {parameter} is incomplete in the base, or stored in another order."
            )
        pieces, row = [], 0
        for _, ref in parts:
            pieces.append(Piece(ref, row, row + ref.shape[0]))
            row += ref.shape[0]
        return WeightView((row, parts[0][1].shape[1]), tuple(pieces))

    def part(self, region: Region, *, transposed: bool) -> WeightView:
        """What an adapter of the unfused layout calls a weight: a part of the rows of one expert."""
        for other, ref in self._by_parameter.get(region.parameter, ()):
            if other == region:
                return WeightView((ref.shape[0], ref.shape[1]), (Piece(ref, 0, ref.shape[0]),))
        return self._slice(
            self.single(region.parameter), region.index or 0, region.part, region.parts, transposed=transposed
        )

    def single(self, parameter: str) -> TensorRef:
        """The stored tensor that is a parameter as it is.

        Raises:
            PlacementError: it is stored in pieces, or together with others.
        """
        if not self.is_whole(parameter):
            raise PlacementError(f"the base stores {parameter} in a form that mapconv cannot place an adapter on.")
        return self._by_parameter[parameter][0][1]

    def _slice(self, ref: TensorRef, index: int, part: int, parts: int, *, transposed: bool) -> WeightView:
        if len(ref.shape) != 3 or index >= ref.shape[0]:
            raise PlacementError(f"{ref.name} is {list(ref.shape)}, which has no expert {index}.")
        height, width = ref.shape[1:][::-1] if transposed else ref.shape[1:]
        rows = height // parts
        piece = Piece(ref, 0, rows, index=index, stacked=True, offset=part * rows, transposed=transposed)
        return WeightView((rows, width), (piece,))
