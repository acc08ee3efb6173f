"""Updates from an adapter's files: factors in memory, scalars as recorded, and the base held against the record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from mapconv.adapter import Adapter, MapModule, Module, TensorRef
from mapconv.algebra.fingerprint import Fingerprint, matrix_fingerprint
from mapconv.algebra.initializations import initial_factors
from mapconv.algebra.norms import product_norm
from mapconv.checkpoint.headers import read_tensor_file
from mapconv.checkpoint.reader import TORCH_DTYPES, TensorReader
from mapconv.errors import AdapterError, BaseMismatchError, PlacementError, UnsupportedError
from mapconv.formats.peft import KEY_PREFIX, WEIGHTS_FILE
from mapconv.merging.merger import DIRECTION_TOLERANCE
from mapconv.nn.bases import kind_of, values_of
from mapconv.nn.dora import DoraUpdate
from mapconv.nn.stacks import StackedParameter, StackUpdate
from mapconv.nn.updates import Origin, Update
from mapconv.placement.authors_scalars import as_map
from mapconv.placement.base_check import TOLERANCE, base_fault


class UpdateReader:
    """Makes updates from an adapter's files. Use it as a context manager."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._reader = TensorReader()
        self._scalars = {(scalars.path, scalars.expert): scalars for scalars in adapter.map_modules}
        self._authors = {scalars.factor: scalars for scalars in adapter.authors_scalars}
        entries = (adapter.map_config or {}).get("modules", [])
        self._entries = {(str(entry["path"]), entry.get("expert")): entry for entry in entries}
        weights = adapter.path / WEIGHTS_FILE
        refs = read_tensor_file(weights).tensors if adapter.method == "MAP" and weights.exists() else ()
        self._refs = {ref.name: ref for ref in refs}

    def __enter__(self) -> UpdateReader:
        self._reader.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._reader.__exit__(*exception)

    def update(self, module: Module, live: str, layer: nn.Module, check_base: bool) -> Update:
        """One weight's update, in float32 on the CPU."""
        if module.magnitude is not None and not module.rescaling.is_peft:
            raise UnsupportedError(
                f"{module.path} is a DoRA of a kind that PEFT does not have (rescaled by {module.rescaling}): upgrade "
                "the adapter, and load the result."
            )
        A, B = self._factor(module.lora_A), self._factor(module.lora_B)
        scalars = self._scalars.get((module.path, None))
        if scalars is None:
            if self._adapter.settings.initialization and kind_of(layer) in ("linear", "transposed"):
                with values_of(layer, live) as weight:
                    base = weight.float()
                    B0, A0 = initial_factors(self._adapter.settings.initialization, base, module.rank, module.scaling)
                A, B = torch.cat([A, A0.cpu()]), torch.cat([B, -B0.cpu()], dim=1)
            if module.lora_A.name not in self._authors:
                B *= module.scaling
        with values_of(layer, live) if scalars is None or check_base else nullcontext() as weight:
            norm, projection = self._base_facts(module, None, weight, live)
        if module.lora_A.name in self._authors:
            assert projection is not None  # the weight was measured: there is no record
            found = Fingerprint(norm**2, projection)
            scalars = as_map(module, self._authors[module.lora_A.name], found, product_norm(B, A))
        update = self._dora(module, scalars, norm, A, B) if module.magnitude else self._low_rank(scalars, norm, A, B)
        update.base_projection = projection
        ref = self._refs.get(f"{KEY_PREFIX}{module.path}.lora_magnitude_vector")
        magnitude = None if ref is None else self.finite(ref).reshape(-1)
        update.origin = self._origin(module, [None], update, magnitude)
        return update

    def stack(self, module: Module, stack: StackedParameter, check_base: bool) -> StackUpdate:
        """The updates of a stacked parameter's weights, in float32 on the CPU."""
        (height, width), count = stack.matrix_shape, stack.count
        # A holds the experts one after another; in B they count fastest.
        A = self._factor(module.lora_A).view(count, -1, width)
        B = self._factor(module.lora_B).view(height, -1, count).permute(2, 0, 1).contiguous()
        recorded = [self._scalars.get((module.path, expert)) for expert in stack.experts]
        betas, facts = [], []
        if None in recorded:
            B *= self._adapter.settings.scaling_of(stack.parameter)
        with stack.weights() if None in recorded or check_base else nullcontext() as weights:
            for number, (expert, scalars) in enumerate(zip(stack.experts, recorded, strict=True)):
                weight = None if weights is None else weights[number]
                facts.append(self._base_facts(module, expert, weight, stack.parameter))
                norm = product_norm(B[number], A[number])
                if scalars is None:
                    betas.append(norm / (facts[-1][0] or 1.0))
                    continue
                self._check_direction(scalars, norm)
                if scalars.base_gain != 1.0:
                    raise AdapterError(
                        f"{self._adapter.path}: {module.path} has a base gain of {scalars.base_gain}, expected 1: "
                        "stock PEFT has no DoRA for a stacked parameter."
                    )
                betas.append(scalars.beta / (scalars.base_norm or 1.0))
        norms, projections = zip(*facts, strict=True)
        update = StackUpdate(A, B, relative_betas=betas, base_norms=norms, base_projections=projections)
        update.origin = self._origin(module, stack.experts, update, None)
        return update

    def _base_facts(
        self, module: Module, expert: int | None, weight: torch.Tensor | None, live: str
    ) -> tuple[float, float | None]:
        """(‖W0‖, its projection): as recorded, or of ``weight``; where there are both they must be the same."""
        scalars = self._scalars.get((module.path, expert))
        if weight is not None:
            found = matrix_fingerprint(weight)
            if not math.isfinite(found.square):
                raise PlacementError(f"{live}: the model's weight holds NaN or infinity.")
            if scalars is None:
                return found.norm, found.projection
            recorded = self._entries.get((module.path, expert), {}).get("base_dtype")
            _check_base(scalars, found, weight, live, recorded)
        assert scalars is not None  # or the weight was given
        return scalars.base_norm, scalars.base_projection

    def _origin(
        self, module: Module, experts: Sequence[int | None], update: Update, magnitude: torch.Tensor | None
    ) -> Origin:
        keys = [(module.path, expert) for expert in experts]
        entries = [self._entries.get(key, {}) for key in keys]
        return Origin(
            module=module,
            scalars=tuple(self._scalars[key] for key in keys if key in self._scalars),
            base_facts=tuple(
                {key: entry[key] for key in ("base_tensor", "base_dtype", "base_shape") if key in entry}
                for entry in entries
            ),
            dtype=TORCH_DTYPES[module.lora_A.dtype],
            magnitude=magnitude,
            digest=update.digest(),
        )

    def _low_rank(self, scalars: MapModule | None, base_norm: float, A: torch.Tensor, B: torch.Tensor) -> Update:
        norm = product_norm(B, A)
        if scalars is None:
            return Update(A, B, relative_alpha=1.0, relative_beta=norm / (base_norm or 1.0), base_norm=base_norm)
        self._check_direction(scalars, norm)
        base_norm = scalars.base_norm
        relative_beta = scalars.beta / (base_norm or 1.0)
        return Update(A, B, relative_alpha=scalars.base_gain, relative_beta=relative_beta, base_norm=base_norm)

    def _check_direction(self, scalars: MapModule, norm: float) -> None:
        if abs(norm - scalars.direction_norm) > DIRECTION_TOLERANCE * max(norm, scalars.direction_norm):
            raise AdapterError(
                f"{self._adapter.path}: the direction of {scalars.path} has norm {norm:.7g}, but map_config.json says "
                f"{scalars.direction_norm:.7g}: the two files do not belong together."
            )

    def _dora(
        self, module: Module, scalars: MapModule | None, base_norm: float, A: torch.Tensor, B: torch.Tensor
    ) -> DoraUpdate:
        a = b = 1.0
        if scalars is not None:
            a, base_norm = scalars.base_gain, scalars.base_norm
            # A direction of length 0 has no gain; one keeps its factors alive.
            b = scalars.update_gain if scalars.direction_norm else 1.0
        assert module.magnitude is not None  # it is what makes the module a DoRA
        magnitude = self._factor(module.magnitude).reshape(-1)
        return DoraUpdate(A, B, magnitude, relative_alpha=a, relative_beta=b, base_norm=base_norm)

    def bias(self, module: Module) -> torch.Tensor:
        """What ``lora_bias`` adds, scaling included."""
        assert module.bias is not None  # only modules with one are asked
        return self._factor(module.bias) * (1.0 if (module.path, None) in self._scalars else module.scaling)

    def finite(self, ref: TensorRef) -> torch.Tensor:
        """A tensor as it is stored."""
        tensor = self._reader.read(ref)
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{ref.file}: tensor {ref.name} holds NaN or infinity: the training run diverged.")
        return tensor

    def _factor(self, ref: TensorRef) -> torch.Tensor:
        """A factor as a matrix in float32 of its own: a kernel counts as inputs."""
        tensor = self.finite(ref).float()
        return tensor.flatten(1) if tensor.dim() > 2 else tensor


def _check_base(scalars: MapModule, found: Fingerprint, weight: torch.Tensor, live: str, recorded: str | None) -> None:
    """Compare W0's fingerprint with the recorded one, as exactly as the model's dtype lets them agree."""
    dtype, tolerances = weight.dtype, {}
    if recorded not in TORCH_DTYPES or torch.promote_types(TORCH_DTYPES[recorded], dtype) is not dtype:
        # Rounding N weights, each by at most the fraction u: the errors are independent, and add a part u² at most.
        unit = torch.finfo(dtype).eps / 2
        tolerances["norm_tolerance"] = TOLERANCE + unit**2 + 16 * unit / math.sqrt(weight.numel() or 1)
        # Their own projection has a standard deviation of u·‖W0‖ at most.
        tolerances["tolerance"] = TOLERANCE + 16 * unit
    fault = base_fault(scalars, found, **tolerances)
    if fault is not None:
        raise BaseMismatchError(f"{live} {fault}: load that base, or accept this one with check_base=False.")
