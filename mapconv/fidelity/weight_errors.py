"""ε of every weight of a result, measured on the bytes of both adapters, whatever their forms."""

from __future__ import annotations

import torch

from mapconv.algebra.dora import merge_rows_
from mapconv.algebra.norms import row_blocks, squared_norm
from mapconv.checkpoint.reader import TensorReader
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.factors import FactorLoader
from mapconv.placement.tuned import TunedWeights
from mapconv.placement.weights import PlacedModule, read_weight
from mapconv.runtime.threads import in_order, worker_count


def weight_errors(source: PlacedAdapter, result: PlacedAdapter) -> dict[tuple[str, int | None], float]:
    """ε = ‖T − W'‖ / ‖T − W0‖ of each weight by its key, both weights formed row block by row block in float64.

    W0 is the base that the result is for, which need not be the one that the source was trained on.
    """
    results = {item.key: item for item in result.modules}
    pairs = [(item, results[item.key]) for item in source.modules]
    workers = worker_count(max(8 * item.weight.numel for item in source.modules))
    with TensorReader(source.target.checkpoint.source) as trained, TensorReader(result.target.checkpoint.source) as own:
        loader, tuned = FactorLoader(trained), TunedWeights(source.modules, trained)
        errors = in_order(lambda pair: _error(*pair, (trained, own), loader, tuned), pairs, workers)
        return {item.key: error for (item, _), error in zip(pairs, errors, strict=True)}


def _error(
    source: PlacedModule,
    result: PlacedModule,
    readers: tuple[TensorReader, TensorReader],
    loader: FactorLoader,
    tuned: TunedWeights,
) -> float:
    trained = read_weight(source.weight, readers[0], torch.empty(source.weight.numel))
    same = result.weight == source.weight
    base = trained if same else read_weight(result.weight, readers[1], torch.empty(result.weight.numel))
    got = _Weight(result, loader)
    if source.module.method is None:
        wanted: _Weight | _Whole = _Weight(source, loader)
    else:
        wanted = _Whole(tuned.merged(source, trained.clone())[0])
    error = update = 0.0
    for start, stop in row_blocks(*source.weight.shape):
        rows = base[start:stop].double()
        target = wanted.rows(trained[start:stop].double(), start, stop)
        error += squared_norm(target - got.rows(rows, start, stop))
        update += squared_norm(target - rows)
    return (error / update) ** 0.5 if update else 0.0


class _Whole:
    """The rows of a weight that PEFT has merged."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def rows(self, base: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return self._weight[start:stop].double()


class _Weight:
    """An adapted weight's rows: LoRA and DoRA by their scaling, MAP by its gains."""

    def __init__(self, placed: PlacedModule, loader: FactorLoader) -> None:
        factors = loader.load(placed)
        self._A, self._B = factors.A.double(), factors.B.double() * placed.scaling
        self._magnitude, scalars = factors.magnitude, placed.scalars
        self._gains = (1.0, 1.0) if scalars is None else (scalars.base_gain, scalars.update_gain)

    def rows(self, base: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        magnitude = None if self._magnitude is None else self._magnitude[start:stop]
        a, b = self._gains
        return merge_rows_(base.clone(), self._A, self._B[start:stop], base_gain=a, update_gain=b, magnitude=magnitude)
