"""Put an adapter whose keys only the base's names can resolve on that base: all of its modules at once, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mapconv.adapter import Adapter, Module, TensorRef
from mapconv.errors import PlacementError
from mapconv.placement.agreement import require_bijection
from mapconv.placement.by_name import misfit_report, nearest
from mapconv.placement.spelling.names import SpelledNames
from mapconv.placement.weights import Piece, PlacedModule, WeightView


class SpelledPlacement:
    """One adapter's names in a base, and its modules on the base's tensors."""

    def __init__(self, adapter: Adapter, tensors: Mapping[str, TensorRef], names: SpelledNames) -> None:
        self.adapter, self.tensors, self._names = adapter, tensors, names

    def stored_name(self, parameter: str) -> str:
        """What the base calls a parameter of the adapter; a name that it has not got where it has none."""
        return parameter

    def modules(self) -> tuple[PlacedModule, ...]:
        """Every module on its tensor.

        Raises:
            PlacementError: modules for a model that the base has not got, without a tensor that they fit, or with more
                than one that their keys may mean.
        """
        self._require_models()
        placed, misfits = [], []
        for module in self.adapter.modules:
            fits = self._fits(module)
            if len(fits) == 1:
                placed.append(fits[0])
            else:
                misfits.append(self._misfit(module, fits))
        if misfits:
            raise PlacementError(misfit_report(misfits, len(self.adapter.modules)))
        require_bijection(placed)
        return tuple(placed)

    def _require_models(self) -> None:
        for module in self.adapter.modules:
            assert module.spelling is not None  # of an adapter in such a dialect
            if not self._names.has(module.spelling):
                wanted = " or ".join(module.spelling.components)
                own = ", ".join(str(part.role) for part in self._names.components)
                raise PlacementError(
                    f"{self.adapter.path} adapts a {wanted} ({module.path}), but the base has only: {own}. Give a base "
                    "that has it with --base, such as the whole folder of the pipeline."
                )

    def _fits(self, module: Module) -> list[PlacedModule]:
        assert module.spelling is not None  # of an adapter in such a dialect
        found = (self._on(module, path) for path in self._names.find(module.spelling))
        return [item for item in found if item is not None]

    def _on(self, module: Module, path: str) -> PlacedModule | None:
        """The module on the weight of one path; None where the shapes do not agree."""
        ref = self.tensors[f"{path}.weight"]
        height, width = module.weight_shape
        kernel = ref.shape[2:]
        factors = module.lora_A.shape[2:]
        # Trainers write the factors of a 1×1 convolution with its kernel or without it.
        if ref.shape[:1] != (height,) or ref.numel != height * width or (factors and factors != kernel):
            return None
        if len(module.lora_A.shape) != len(ref.shape):
            A = replace(module.lora_A, shape=(module.rank, *ref.shape[1:]))
            B = replace(module.lora_B, shape=(height, module.rank, *(1 for _ in kernel)))
            module = replace(module, lora_A=A, lora_B=B)
        view = WeightView((height, width), (Piece(ref, 0, height),))
        module = replace(module, path=path, spelling=None)
        return PlacedModule(module, view, ref.name, module.rank, module.scaling)

    def _misfit(self, module: Module, fits: list[PlacedModule]) -> str:
        assert module.spelling is not None  # of an adapter in such a dialect
        if fits:
            named = " and ".join(item.module.path for item in fits)
            return f"{module.path}: it may mean {named}, and both fit"
        found = self._names.find(module.spelling)
        if found:
            shapes = " and ".join(f"{path}.weight is {list(self.tensors[path + '.weight'].shape)}" for path in found)
            return f"{module.path}: {shapes}, the adapter expects {list(module.weight_shape)}"
        return f"{module.path}: the base has no module of that name{nearest(module.spelling.name, self.tensors)}"
