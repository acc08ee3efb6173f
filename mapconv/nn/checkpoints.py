"""What trainers ask of a model, answered for its adapter alone: ``save_pretrained`` and loading a checkpoint again.

``transformers.Trainer`` and TRL's save every model by its ``save_pretrained``, and resume by loading a checkpoint's
``model.safetensors`` into it. While an adapter is attached, that method writes a MAP directory; a trainer's checkpoint
also holds the parameters as they train, from which a run goes on to the same bits: a MAP directory has β in B.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from mapconv.checkpoint.staging import staged_files
from mapconv.checkpoint.writer import SpooledFile
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.mapdir import MAP_CONFIG_FILE
from mapconv.formats.peft import CONFIG_FILE
from mapconv.nn.attaching import map_layers, state_of
from mapconv.nn.layers import MapLayer
from mapconv.nn.saving import check_saving, write_adapter

#: The file that Trainer loads, with ``strict=False``, from its own folders, and how it names those.
STATE_FILE = "model.safetensors"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
#: How to cut, spell or fetch the files of a whole model: for an adapter's there is one way.
_OF_WHOLE_MODELS = {"max_shard_size", "safe_serialization", "save_original_format", "save_peft_format", "token"}
_UPDATE = re.compile(r"(?:^|\.)updates\.")


def serve_trainers(model: nn.Module) -> None:
    """Let the model's ``save_pretrained`` write its running adapter, and its checkpoints load without the base.

    ``detach`` of the last adapter takes it back.
    """
    state = state_of(model)
    if hasattr(model, "save_pretrained") and not state.methods:
        vars(model)["save_pretrained"] = MethodType(save_pretrained, model)
        state.methods.append("save_pretrained")
        state.hooks.append(model.register_load_state_dict_post_hook(_without_base))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, MapLayer) and not head._forward_pre_hooks:
        state.hooks += _watch_head(model, head)


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    **settings: Any,
) -> None:
    """Write the running adapter as a MAP directory, into a folder that may hold other files.

    Args:
        model: the model, which this is bound to.
        save_directory: the folder.
        is_main_process: write at all.
        state_dict: the model's values where its own parameters are shards of them (FSDP, DeepSpeed).
        settings: those of transformers' method that have a meaning for a whole model alone.

    Raises:
        AdapterError: no adapter runs. MapconvError: as ``save_adapter`` raises it. TypeError: any other setting.
    """
    for setting, value in settings.items():
        if setting not in _OF_WHOLE_MODELS and value:
            raise TypeError(f"save_pretrained of a model with a MAP adapter has no setting {setting!r}")
    if not is_main_process:
        return
    name = state_of(model).active
    if name is None:
        raise AdapterError("no adapter is active: choose the one to save with set_adapter.")
    out = Path(save_directory)
    base = check_saving(model, out, name, force=True, carries_over=True)
    with _gathered(model, state_dict or {}), staged_files(out, last=(CONFIG_FILE, MAP_CONFIG_FILE)) as staging:
        write_adapter(model, staging, name, base)
        if _CHECKPOINT.fullmatch(out.name):
            _write_state(model, staging)


def _write_state(model: nn.Module, staging: Path) -> None:
    """The parameters of all adapters under the model's own names for them."""
    spool = SpooledFile(staging / STATE_FILE)
    try:
        for path, layer in map_layers(model).items():
            for name, parameter in layer.updates.named_parameters(f"{path}.updates"):
                spool.append(name, parameter)
        spool.finish()
    finally:
        spool.close()


@contextmanager
def _gathered(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put whole values in the place of the wrapped layers' parameters that are shards of them."""
    changed: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for path, layer in map_layers(model).items():
            for inner, module in layer.named_modules(prefix=_plain(path)):
                for leaf, parameter in module._parameters.items():
                    value = values.get(f"{_plain(inner)}.{leaf}")
                    if parameter is not None and value is not None and value is not parameter:
                        changed.append((module, leaf, parameter))
                        module._parameters[leaf] = nn.Parameter(value.detach(), requires_grad=parameter.requires_grad)
        yield
    finally:
        for module, leaf, parameter in changed:
            module._parameters[leaf] = parameter


def _plain(path: str) -> str:
    """A path without the names of FSDP's wrappers, as a state has it."""
    return path.replace("_fsdp_wrapped_module.", "").replace("._fsdp_wrapped_module", "")


def _without_base(model: nn.Module, keys: Any) -> None:
    """Do not call the base's own parameters missing where a checkpoint holds the adapters alone.

    Raises:
        AdapterError: it holds a part of an adapter that the model has not, which ``strict=False`` would leave out: a
            run of another ``MapConfig`` would go on from a mixture of both.
    """
    foreign = next((key for key in keys.unexpected_keys if _UPDATE.search(key)), None)
    if foreign is not None:
        raise AdapterError(
            f"the checkpoint holds {foreign}, which this model has not: make the model with the MapConfig of the run "
            "that the checkpoint is of (its targets, direction and units)."
        )
    missing = set(keys.missing_keys)
    own = {key for key in model.state_dict() if _UPDATE.search(key)}
    if not missing & own and len(missing) == len(model.state_dict()) - len(own):
        keys.missing_keys.clear()


def _watch_head(model: nn.Module, head: MapLayer) -> list[Any]:
    """Refuse a training step that multiplies by the output head's own weight, and so passes its update by.

    TRL's fused losses and Liger's do.
    """
    calls: list[None] = []

    def before(*_: object) -> None:
        calls.clear()

    def after(*_: object) -> None:
        if head.training and head.active is not None and not calls:
            raise UnsupportedError(
                f"{head.path} has a MAP update, but this model's forward pass multiplies by the weight alone (a fused "
                "loss, as TRL's trainers and Liger's kernels have it), so that the update would never be trained: "
                f"leave {head.path} out of the targets."
            )

    return [
        head.register_forward_pre_hook(lambda *_: calls.append(None)),
        model.register_forward_pre_hook(before),
        model.register_forward_hook(after),
    ]
