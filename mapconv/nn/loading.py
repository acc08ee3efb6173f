"""Attach an adapter from its files to a live model: read, place every tensor, check the base, then change the model."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from mapconv.adapter import Adapter, MapModule, Module, TensorRef
from mapconv.algebra.fingerprint import Fingerprint
from mapconv.algebra.initializations import initial_factors
from mapconv.algebra.norms import product_norm
from mapconv.checkpoint.headers import read_tensor_file
from mapconv.checkpoint.reader import TORCH_DTYPES, TensorReader
from mapconv.errors import AdapterError, BaseMismatchError, PlacementError, UnsupportedError
from mapconv.formats import read_adapter
from mapconv.formats.peft import KEY_PREFIX, WEIGHTS_FILE
from mapconv.hub.locate import locate_adapter
from mapconv.merging.merger import DIRECTION_TOLERANCE
from mapconv.metadata.provenance import source_record
from mapconv.nn.attaching import Attached, Trainable, adaptable, attach, check_model, disabled, has_adapters
from mapconv.nn.bases import base_fingerprint, kind_of, values_of, weight_of
from mapconv.nn.checkpoints import serve_trainers
from mapconv.nn.placement import place_on_layers
from mapconv.nn.updates import DoraUpdate, Origin, Update
from mapconv.nn.whole import replacements
from mapconv.placement.authors_scalars import as_map
from mapconv.placement.base_check import TOLERANCE, base_fault


def load_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    name: str = "default",
    trainable: Trainable = "none",
    check_base: bool = True,
    allow_pickle: bool = False,
) -> nn.Module:
    """Attach a MAP directory, or a LoRA or DoRA adapter, to ``model`` in place, and run with it.

    A LoRA takes the low-rank form and a DoRA the direction ``dora``, both exactly. Its whole tensors
    (heads, biases, token rows) take the base's place while the adapter is active, and are not trained. The base is
    frozen until the last adapter is detached.

    Args:
        model: the model that the adapter was trained on, or a part of it such as ``model.model``.
        path: the adapter's folder, or a Hub reference (``owner/name[@revision][:subfolder]``).
        name: what to call it; several adapters can be attached to one model (``set_adapter``).
        trainable: ``none``, ``scalars`` (α and β: two numbers for each weight) or ``all`` (the factors as well; an
            update that is zero then gets a random B at β = 0, because a zero matrix has no direction to train).
        check_base: refuse a model whose weights are not those that the MAP directory recorded.
        allow_pickle: read weights from a ``.bin`` file (with torch's weights-only loader).

    Returns:
        The same model.

    Raises:
        MapconvError: of the kind that fits; the model is then as it was.
    """
    if trainable not in get_args(Trainable):
        raise ValueError(f"trainable is {trainable!r}, expected one of {', '.join(get_args(Trainable))}")
    check_model(model, name)
    folder = locate_adapter(path, allow_pickle=allow_pickle)
    adapter = read_adapter(folder, allow_pickle=allow_pickle)
    _refuse_features(adapter)
    layers = adaptable(model)
    placed, rename = place_on_layers(model, adapter, layers)
    with disabled(model) if has_adapters(model) else nullcontext(), _Loader(adapter) as loader:
        updates = {live: loader.update(module, live, layers[live], check_base) for module, live in placed}
        biases = {live: loader.bias(module) for module, live in placed if module.bias is not None}
        others = {key: loader.finite(ref) for key, ref in adapter.others.items()}
        values = {ref.name: others[key] for key, ref in adapter.others.items()}
        replaced = replacements(model, adapter, values, rename, biases)
        others |= {
            f"{KEY_PREFIX}{module.path}.lora_B.bias": loader.bias(module)
            for module, _ in placed
            if module.bias is not None
        }
    if trainable == "all":
        for update in updates.values():
            _revive(update)
    map_config = adapter.map_config or {}
    attached = Attached(
        adapter=adapter,
        paths=tuple(updates),
        options=map_config.get("options") or {},
        replacements=replaced,
        others=others,
        base=map_config.get("base") if check_base else None,
        source=source_record(adapter),
    )
    attach(model, name, updates, attached, trainable)
    serve_trainers(model)
    return model


def _refuse_features(adapter: Adapter) -> None:
    settings, merge = adapter.settings, "merge it with `mapconv merge` and load the merged model"
    if settings.target_parameters:
        raise UnsupportedError(
            f"{adapter.path} adapts stacked expert parameters (target_parameters), which no layer runs: {merge}."
        )
    if settings.layer_replication:
        raise UnsupportedError(f"{adapter.path} repeats the base's layers (layer_replication): {merge}.")


class _Loader:
    """Makes updates from an adapter's files. Use it as a context manager."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._reader = TensorReader()
        self._scalars = {scalars.path: scalars for scalars in adapter.map_modules}
        self._authors = {scalars.path: scalars for scalars in adapter.authors_scalars}
        self._entries = {str(entry["path"]): entry for entry in (adapter.map_config or {}).get("modules", [])}
        weights = adapter.path / WEIGHTS_FILE
        refs = read_tensor_file(weights).tensors if adapter.method == "MAP" and weights.exists() else ()
        self._refs = {ref.name: ref for ref in refs}

    def __enter__(self) -> _Loader:
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
        scalars = self._scalars.get(module.path)
        entry = self._entries.get(module.path, {})
        if scalars is None:
            if self._adapter.settings.initialization and kind_of(layer) in ("linear", "transposed"):
                with values_of(layer, live) as weight:
                    base = weight.float()
                    B0, A0 = initial_factors(self._adapter.settings.initialization, base, module.rank, module.scaling)
                A, B = torch.cat([A, A0.cpu()]), torch.cat([B, -B0.cpu()], dim=1)
            if module.path not in self._authors:
                B *= module.scaling
        if scalars is None or check_base:
            found = base_fingerprint(layer, live)
            if not math.isfinite(found.square):
                raise PlacementError(f"{live}: the model's weight holds NaN or infinity.")
            if scalars is not None:
                _check_base(scalars, found, layer, live, entry.get("base_dtype"))
        if scalars is None:
            norm, projection = found.norm, found.projection
        else:
            norm, projection = scalars.base_norm, scalars.base_projection
        recorded = scalars
        if module.path in self._authors:
            scalars = as_map(module, self._authors[module.path], found, product_norm(B, A))
        update = self._dora(module, scalars, norm, A, B) if module.magnitude else self._low_rank(scalars, norm, A, B)
        update.base_projection = projection
        ref = self._refs.get(f"{KEY_PREFIX}{module.path}.lora_magnitude_vector")
        update.origin = Origin(
            module=module,
            scalars=recorded,
            base_facts={key: entry[key] for key in ("base_tensor", "base_dtype", "base_shape") if key in entry},
            dtype=TORCH_DTYPES[module.lora_A.dtype],
            magnitude=None if ref is None else self.finite(ref).reshape(-1),
            digest=update.digest(),
        )
        return update

    def _low_rank(self, scalars: MapModule | None, base_norm: float, A: torch.Tensor, B: torch.Tensor) -> Update:
        norm = product_norm(B, A)
        if scalars is None:
            return Update(A, B, relative_alpha=1.0, relative_beta=norm / (base_norm or 1.0), base_norm=base_norm)
        if abs(norm - scalars.direction_norm) > DIRECTION_TOLERANCE * max(norm, scalars.direction_norm):
            raise AdapterError(
                f"{self._adapter.path}: the direction of {scalars.path} has norm {norm:.7g}, but map_config.json says "
                f"{scalars.direction_norm:.7g}: the two files do not belong together."
            )
        base_norm = scalars.base_norm
        relative_beta = scalars.beta / (base_norm or 1.0)
        return Update(A, B, relative_alpha=scalars.base_gain, relative_beta=relative_beta, base_norm=base_norm)

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
        return self._factor(module.bias) * (1.0 if module.path in self._scalars else module.scaling)

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


def _check_base(scalars: MapModule, found: Fingerprint, layer: nn.Module, live: str, recorded: str | None) -> None:
    """Compare W0's fingerprint with the recorded one, as exactly as the model's dtype lets them agree."""
    weight = weight_of(layer)
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


def _revive(update: Update) -> None:
    """Give an update of zero a random direction at β = 0, which changes no output but can be trained."""
    if update.direction == "low-rank" and product_norm(update.B.detach(), update.A.detach()) == 0.0:
        generator = torch.Generator().manual_seed(0)
        for factor in (update.A, update.B):
            if not factor.any():
                factor.data.normal_(std=factor.shape[1] ** -0.5, generator=generator)
