"""MAP on another method of PEFT's in files: the method's own, with α and β beside each layer's tensors.

Where every α is ‖W0‖ and β goes into a tensor that Δ is linear in, the file is the method's alone, and stock PEFT
computes the same. Else ``map_alpha`` and ``map_beta`` (``formats.peft_methods``) say them, under a ``peft_type`` that
stock PEFT refuses, because it would leave them out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mapconv.adapter import Adapter, MapModule
from mapconv.checkpoint.sidecars import copy_tokenizer
from mapconv.checkpoint.staging import write_file
from mapconv.checkpoint.writer import SpooledFile
from mapconv.errors import AdapterError, OutputError
from mapconv.formats.peft import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE
from mapconv.formats.peft_methods import MAP_PREFIX, SCALAR_NAMES
from mapconv.metadata.card import CARD_FILE, ON_METHOD, local_card
from mapconv.nn.attaching import Attached
from mapconv.nn.bases import base_fingerprint
from mapconv.nn.methods import MethodUpdate, PeftMethod
from mapconv.nn.origin import live_record
from mapconv.nn.reading import UpdateReader
from mapconv.tuners.config import tuner_config

#: Δ is linear in a tensor if it follows the tensor's length to this share of itself.
_LINEAR = 1e-5


@torch.no_grad()
def write_method(
    staging: Path, attached: Attached, method: PeftMethod, updates: Mapping[str, MethodUpdate], base: Mapping
) -> None:
    """Write the files of an adapter on another method's layers into the empty folder ``staging``.

    Raises:
        OutputError: values that are not finite.
    """
    with _as_peft_computes(updates) as is_plain:
        tensors = {key: value.detach().cpu().contiguous() for key, value in method.state().items()}
        if not is_plain:
            for path, update in updates.items():
                facts = _facts(path, update)
                for name, value in zip(SCALAR_NAMES, (facts.alpha, facts.beta), strict=True):
                    tensors[f"{KEY_PREFIX}{path}.{name}"] = torch.tensor(value, dtype=torch.float64)
        strange = next((key for key, value in tensors.items() if not torch.isfinite(value).all()), None)
        if strange is not None:
            raise OutputError(f"{strange} holds NaN or infinity: the training run diverged.")
        spool = SpooledFile(staging / WEIGHTS_FILE)
        try:
            for key, value in (tensors | dict(attached.others)).items():
                spool.append(key, value)
            spool.finish()
        finally:
            spool.close()
    if attached.adapter is not None and attached.adapter.path.is_dir():
        copy_tokenizer(attached.adapter.path, staging)
    config = dict(attached.adapter.config) if attached.adapter else method.config.to_dict()
    config |= {"base_model_name_or_path": base["name"], "revision": base["revision"], "inference_mode": True}
    config |= {"target_modules": sorted(updates), "peft_type": method.kind if is_plain else MAP_PREFIX + method.kind}
    record = live_record(attached, base, [], changed=True)
    form = method.name if is_plain else f"{ON_METHOD}{method.name}"
    scalars = [_facts(path, update) for path, update in updates.items()]
    write_file(staging / CARD_FILE, local_card(config, record, scalars, form=form))
    write_file(staging / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True, default=_plain) + "\n")


def load_method(
    adapter: Adapter, layers: Mapping[str, nn.Module], placed: Mapping[str, str], reader: UpdateReader
) -> tuple[PeftMethod, dict[str, MethodUpdate]]:
    """The updates of an adapter of another method by the path of their layer; ``placed`` has each module's.

    Raises:
        AdapterError: a tensor that is missing, misshapen, or none of the method's. UnsupportedError: as ``PeftMethod``.
    """
    modules = [replace(module, path=placed[module.path]) for module in adapter.modules]
    tuner = modules[0].method
    assert tuner is not None  # it is what makes them those of another method
    config = tuner_config(tuner, modules)
    config.inference_mode = False
    method = PeftMethod(config, {module.path: layers[module.path] for module in modules})
    tensors = {
        f"{KEY_PREFIX}{module.path}.{name}": reader.finite(ref) for module in modules for name, ref in module.own
    }
    tensors |= {key: reader.finite(ref) for key, ref in tuner.shared.items()}
    for key, value in method.state().items():
        if key not in tensors or tensors[key].shape != value.shape:
            found = list(tensors[key].shape) if key in tensors else "no such tensor"
            raise AdapterError(f"{adapter.path}: {key} is {found}, expected {list(value.shape)} on this model.")
    method.load(tensors)
    updates = {}
    for module in modules:
        norm = base_fingerprint(layers[module.path], module.path).norm
        update = MethodUpdate(method, module.path, relative_alpha=1.0, relative_beta=0.0, base_norm=norm, floor=0.0)
        alpha, beta = module.map_scalars or (norm, update.length())
        update.restart(alpha / (norm or 1.0), beta / (norm or 1.0))
        updates[module.path] = update
    return method, updates


def _facts(path: str, update: MethodUpdate) -> MapModule:
    """What the card says of a layer; its update is of any rank."""
    beta = update.exact("beta") * update.share() * (update.base_norm or 1.0)
    return MapModule(
        path=path,
        direction="low-rank",
        rank=update.rank,
        alpha=update.alpha(),
        beta=beta,
        base_norm=update.base_norm,
        base_projection=None,
        direction_norm=update.length(),
        error=None,
    )


@contextmanager
def _as_peft_computes(updates: Mapping[str, MethodUpdate]) -> Iterator[bool]:
    """Put every b into a tensor of its layer for the time of the block; False where that cannot be done for all."""
    changed: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        yield all(update.exact("alpha") == 1.0 for update in updates.values()) and all(
            _absorb(update, changed) for update in updates.values()
        )
    finally:
        for parameter, value in reversed(changed):
            parameter.copy_(value)


def _absorb(update: MethodUpdate, changed: list[tuple[nn.Parameter, torch.Tensor]]) -> bool:
    gain = float(update.gains()[1])
    if update.is_unscaled:
        return True
    wanted = gain * update.delta()
    for parameter in update.factors:
        if any(parameter is other for other, _ in changed):
            return False  # a tensor that another layer shares
        before = parameter.clone()
        parameter.mul_(gain)
        changed.append((parameter, before))
        if float((update.delta() - wanted).norm()) <= _LINEAR * float(wanted.norm()):
            return True
        parameter.copy_(before)
        changed.pop()
    return False


def _plain(value: object) -> object:
    """A configuration's sets and enumerations as JSON has them."""
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))
