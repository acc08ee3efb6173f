"""The scalars of MAP's authors, which are absolute numbers, as gains of the base weights that they land on."""

from __future__ import annotations

import math
from dataclasses import replace

from mapconv.adapter import Adapter, MapModule, Module
from mapconv.algebra.fingerprint import Fingerprint
from mapconv.algebra.norms import product_norm
from mapconv.checkpoint.index import Checkpoint
from mapconv.checkpoint.reader import TensorReader
from mapconv.errors import CheckpointError
from mapconv.placement.factors import FactorLoader
from mapconv.placement.weights import PlacedModule, weight_fingerprint
from mapconv.runtime.threads import in_order, worker_count
from mapconv.spelling import AuthorsScalars


def with_gains(adapter: Adapter, modules: tuple[PlacedModule, ...], checkpoint: Checkpoint) -> tuple[PlacedModule, ...]:
    """The modules with α, β and the norms that their formula divides by: one pass over the adapted weights.

    Raises:
        CheckpointError: a base weight that holds NaN or infinity.
    """
    scalars = {item.factor: item for item in adapter.authors_scalars}
    with TensorReader(checkpoint.source) as reader:
        loader = FactorLoader(reader)

        def gained(item: PlacedModule) -> PlacedModule:
            factors = loader.load(item)
            found = weight_fingerprint(item.weight, reader)
            if not math.isfinite(found.square):
                raise CheckpointError(f"{item.weight.pieces[0].tensor.file}: {item.weight.name} holds NaN or infinity.")
            length = product_norm(factors.B, factors.A)
            # The gain has the scaling in it, as that of a MAP directory has.
            own = scalars[item.module.lora_A.name]
            return replace(item.with_scalars(as_map(item.module, own, found, length)), scaling=1.0)

        return tuple(in_order(gained, modules, worker_count(16 << 20)))


def as_map(module: Module, scalars: AuthorsScalars, base: Fingerprint, length: float) -> MapModule:
    """Their α·W0/max(‖W0‖, ε) + β·sΔ/max(‖sΔ‖, ε) with the lengths of both terms for α and β; ``length`` is ‖Δ‖."""
    update = module.scaling * length
    return MapModule(
        path=module.path,
        direction="low-rank",
        rank=module.rank,
        alpha=scalars.alpha * _share(base.norm, scalars.eps),
        beta=scalars.beta * math.copysign(_share(abs(update), scalars.eps), update),
        base_norm=base.norm,
        base_projection=base.projection,
        direction_norm=length,
        error=None,
    )


def _share(norm: float, eps: float) -> float:
    """norm/max(norm, eps): 1 but for a norm below the floor."""
    return norm / max(norm, eps) if norm else 0.0
