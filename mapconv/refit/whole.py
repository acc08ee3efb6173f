"""What becomes of tensors that several adapters bring whole: heads, norms, biases, rows of an embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.reader import TensorReader, block_elements, row_ranges
from mapconv.checkpoint.writer import TensorSpec
from mapconv.errors import UnsupportedError
from mapconv.formats.peft import KEY_PREFIX
from mapconv.placement.union import Shared, WholeTensors

#: Words that ``--whole`` takes besides an adapter's name.
FIRST, MEAN = "first", "mean"
_LISTED = 5


@dataclass(frozen=True)
class Wholes:
    """Tensors that go over as one adapter has them, by PEFT's key, and those that are averaged; trained rows that one
    adapter has alone, of whose change the result has a part, its weight."""

    carried: Mapping[str, TensorRef]
    averaged: tuple[WholeTensors, ...]
    weighed: tuple[WholeTensors, ...]
    notes: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.carried) + len(self.averaged) + len(self.weighed)

    @property
    def nbytes(self) -> int:
        made = sum(4 * next(iter(item.refs.values())).numel for item in (*self.averaged, *self.weighed))
        return sum(ref.nbytes for ref in self.carried.values()) + made

    def made(
        self, reader: TensorReader, shared: Sequence[Shared], weights: Sequence[float]
    ) -> Iterator[tuple[str, TensorSpec, Iterator[torch.Tensor]]]:
        """(key, what it is, its blocks) of every tensor that has to be computed: averages, and LoRAs' own biases."""
        for item in self.averaged:
            shape = next(iter(item.refs.values())).shape
            yield item.key, TensorSpec(item.key, "F32", shape), _mean(item, reader, weights)
        for item in self.weighed:
            shape = next(iter(item.refs.values())).shape
            yield item.key, TensorSpec(item.key, "F32", shape), iter([_weighed(item, reader, weights)])
        if any(part.module.bias is not None for item in shared for _, part in item.parts):
            # lora_bias counts for all modules of an adapter, or for none.
            for item in {item.item.module.path: item for item in shared}.values():
                key = f"{KEY_PREFIX}{item.item.module.path}.lora_B.bias"
                bias = _bias(item, reader, weights)
                yield key, TensorSpec(key, "F32", tuple(bias.shape)), iter([bias])


def settle_whole(
    tensors: Sequence[WholeTensors], names: Sequence[str], weights: Sequence[float], rule: str | None
) -> Wholes:
    """Decide for every tensor; ``rule`` is for those that differ from one adapter to another.

    Raises:
        UnsupportedError: tensors that disagree, and no rule; one that names no adapter; or shapes that have no mean.
    """
    carried: dict[str, TensorRef] = {}
    averaged, weighed, disagreeing, notes = [], [], [], []
    chosen, decided = _chosen(names, rule), 0
    with TensorReader() as reader:
        for item in tensors:
            first = next(iter(item.refs.values()))
            if item.base is not None and len(item.refs) == 1 and weights[next(iter(item.refs))] != 1:
                weighed.append(item)
            elif len(item.refs) == 1 or all(_same(first, other, reader) for other in item.refs.values()):
                carried[item.key] = first
            elif rule is None:
                disagreeing.append(item.key.removeprefix(KEY_PREFIX))
            elif rule == MEAN:
                if len({ref.shape for ref in item.refs.values()}) > 1:
                    raise UnsupportedError(
                        f"{item.key} has another shape in each adapter, which have no mean: name one."
                    )
                averaged.append(item)
                decided += 1
            else:
                number = chosen if chosen in item.refs else next(iter(item.refs))
                carried[item.key] = item.refs[number]
                if rule != FIRST and number != chosen:
                    key = item.key.removeprefix(KEY_PREFIX)
                    notes.append(f"{key} is not in {names[chosen]}, and is carried as it is in {names[number]}")
                decided += 1
    if disagreeing:
        shown = ", ".join(disagreeing[:_LISTED]) + (", …" if len(disagreeing) > _LISTED else "")
        raise UnsupportedError(
            f"the adapters bring other values for {shown}, and only one can stand in the result: give --whole first, "
            "--whole mean, or --whole and an adapter's name."
        )
    if rule is not None and not decided:
        notes.append("no whole tensors disagree: --whole decides nothing")
    for item in tensors:
        if len(item.refs) == 1 and len(names) > 1:
            number = next(iter(item.refs))
            what = f"its change is weighed by {weights[number]:g}" if item in weighed else "is carried as it is there"
            if item not in weighed and weights[number] != 1:
                what += f": the weight {weights[number]:g} is for changes by factors"
            notes.append(f"{item.key.removeprefix(KEY_PREFIX)} is in {names[number]} alone, and {what}")
    if rule == MEAN and averaged and sum(weights) == 0:
        raise UnsupportedError("--whole mean has no mean of weights that add up to 0: name an adapter instead.")
    return Wholes(carried, tuple(averaged), tuple(weighed), tuple(notes[:_LISTED]))


def _chosen(names: Sequence[str], rule: str | None) -> int:
    """The number of the adapter whose tensors count."""
    if rule in (None, FIRST, MEAN):
        return 0
    found = [number for number, name in enumerate(names) if rule == name]
    if not found:
        # By the end of a path, which a catalog has whole.
        end = "/" + str(rule).removeprefix("./").strip("/")
        found = [number for number, name in enumerate(names) if f"/{name.rstrip('/')}".endswith(end)]
    if len(found) != 1:
        raise UnsupportedError(
            f"--whole {rule} names none of the adapters, or several: give first, mean or one of them."
        )
    return found[0]


def _same(one: TensorRef, two: TensorRef, reader: TensorReader) -> bool:
    if one is two:
        return True
    if one.shape != two.shape:
        return False
    buffers = [torch.empty(8 * block_elements(ref), dtype=torch.uint8) for ref in (one, two)]
    return all(
        torch.equal(
            reader.read_range(one, start, stop, buffers[0]).float(),
            reader.read_range(two, start, stop, buffers[1]).float(),
        )
        for start, stop in row_ranges(one)
    )


def _mean(item: WholeTensors, reader: TensorReader, weights: Sequence[float]) -> Iterator[torch.Tensor]:
    """The mean by weights of a tensor, flat, a block at a time in float32; summed in float64."""
    refs = list(item.refs.items())
    total = sum(weights[number] for number, _ in refs)
    buffer = torch.empty(8 * block_elements(refs[0][1]), dtype=torch.uint8)
    for start, stop in row_ranges(refs[0][1]):
        block = torch.zeros(stop - start, dtype=torch.float64)
        for number, ref in refs:
            block += weights[number] / total * reader.read_range(ref, start, stop, buffer).double()
        yield block.float()


def _weighed(item: WholeTensors, reader: TensorReader, weights: Sequence[float]) -> torch.Tensor:
    """W0 + w·(rows − W0), of the base's rows in the place of which they were trained."""
    assert item.base is not None  # rows are of a tensor
    ((number, ref),) = item.refs.items()
    width = item.base.shape[1]
    before, buffer = torch.empty(ref.shape, dtype=torch.float64), torch.empty(8 * width, dtype=torch.uint8)
    for place, index in enumerate(item.rows):
        before[place] = reader.read_range(item.base, index * width, (index + 1) * width, buffer)
    return before.add_(reader.read(ref).double() - before, alpha=weights[number]).float()


def _bias(item: Shared, reader: TensorReader, weights: Sequence[float]) -> torch.Tensor:
    bias = torch.zeros(item.item.module.lora_B.shape[0], dtype=torch.float64)
    for number, part in item.parts:
        if part.module.bias is not None:
            bias += weights[number] * part.scaling * reader.read(part.module.bias).double()
    return bias.float()
