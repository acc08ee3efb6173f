"""The adapters of LitGPT: ``lit_model.pth.lora``, a pickle, with ``hyperparameters.yaml`` and ``model_config.yaml``.

``transformer.h.N.attn.qkv`` has one ``lora_A`` for those of q, k and v that were adapted, one under the other, and one
``lora_B`` with their rows in the same order: each part goes with its own r rows of A (``litgpt/lora.py``,
``LoRAQKVLinear``). Everything is scaled by lora_alpha/lora_r. Rows of q and k are as transformers has them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mapconv.adapter import Adapter, Module, TensorRef
from mapconv.checkpoint.derived import rows_of
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.base import Found, adapter_of
from mapconv.formats.pickle import read_pickle
from mapconv.formats.yaml_settings import read_settings
from mapconv.untrusted.schema import COUNT, FLAG, NULL, NUMBER, TEXT, shown

LITGPT_FILE = "lit_model.pth.lora"
_HYPERPARAMETERS, _MODEL = "hyperparameters.yaml", "model_config.yaml"
_KEY = re.compile(r"(?:transformer\.h\.(?P<layer>[0-9]{1,5})\.)?(?P<name>[a-z0-9_.]+)\.(?P<part>lora_[AB])")
_NAMES = {"attn.proj": "self_attn.o_proj"}
_FEED_FORWARD = {"mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}
#: The feed-forward layers that have these three parts.
_GATED = ("LLaMAMLP", "GemmaMLP")
_ENABLED = {"q_proj": "lora_query", "k_proj": "lora_key", "v_proj": "lora_value"}


class LitgptAdapter:
    """The dialect that ``litgpt finetune_lora`` writes."""

    def recognise(self, found: Found) -> bool:
        return _file(found.path).is_file()

    def read(self, found: Found, *, allow_pickle: bool = False) -> Adapter:
        file = _file(found.path)
        settings = read_settings(
            file.parent / _HYPERPARAMETERS,
            {"lora_r": COUNT, "lora_alpha": NUMBER} | dict.fromkeys(_ENABLED.values(), FLAG),
        )
        config = read_settings(
            file.parent / _MODEL,
            {"n_head": COUNT, "n_embd": COUNT, "n_query_groups": (COUNT, NULL), "head_size": (COUNT, NULL)}
            | {"mlp_class_name": (TEXT, NULL)},
        )
        parts: dict[tuple[str | None, str], dict[str, TensorRef]] = defaultdict(dict)
        for ref in read_pickle(file, allow_pickle=allow_pickle, inside="model"):
            match = _KEY.fullmatch(ref.name)
            if match is None:
                raise UnsupportedError(f"{file}: {ref.name} is not a LoRA of LitGPT as mapconv knows them.")
            parts[match["layer"], match["name"]][match["part"]] = ref
        reading = _Reading(file, settings, config)
        modules = [module for (layer, name), own in parts.items() for module in reading.modules(layer, name, own)]
        return adapter_of(found.path, modules, "LitGPT", base=_base(settings))


def _file(path: Path) -> Path:
    return path if path.name == LITGPT_FILE else path / LITGPT_FILE


def _base(settings: dict[str, Any]) -> str | None:
    """``checkpoints/ORGANISATION/MODEL`` is LitGPT's own copy, named as on the Hub."""
    folder = settings.get("checkpoint_dir")
    parts = Path(folder).parts if isinstance(folder, str) else ()
    return "/".join(parts[-2:]) if len(parts) > 2 and parts[-3] == "checkpoints" else None


class _Reading:
    """One file's modules, with what its two settings say."""

    def __init__(self, file: Path, settings: dict[str, Any], config: dict[str, Any]) -> None:
        self._file, self._settings, self._config = file, settings, config
        self._rank, self._scaling = settings["lora_r"], settings["lora_alpha"] / max(1, settings["lora_r"])

    def modules(self, layer: str | None, name: str, parts: dict[str, TensorRef]) -> Iterator[Module]:
        """Those of transformers that one of LitGPT's is."""
        known = next(iter(parts.values()))
        if set(parts) != {"lora_A", "lora_B"}:
            raise AdapterError(f"{self._file}: {known.name} has no counterpart (lora_A and lora_B).")
        A, B = parts["lora_A"], parts["lora_B"]
        if layer is None and name == "lm_head":
            yield self._module("lm_head", A, B)
        elif layer is not None and name == "attn.qkv":
            yield from self._fused(f"model.layers.{int(layer)}.self_attn", A, B)
        else:
            yield self._module(f"model.layers.{int(layer or 0)}.{self._name(layer, name, known)}", A, B)

    def _name(self, layer: str | None, name: str, known: TensorRef) -> str:
        kind = self._config.get("mlp_class_name")
        names = _NAMES | (_FEED_FORWARD if kind in _GATED else {})
        if layer is None or name not in names:
            why = f" with a feed-forward layer {shown(kind)}" if name.startswith("mlp.") else ""
            raise UnsupportedError(
                f"{self._file}: {known.name} is a layer{why} for which mapconv has no name of transformers': merge "
                "it with litgpt merge_lora and convert_from_litgpt."
            )
        return names[name]

    def _fused(self, path: str, A: TensorRef, B: TensorRef) -> Iterator[Module]:
        config, rank = self._config, self._rank
        heads, groups = config["n_head"], config.get("n_query_groups") or config["n_head"]
        size = config.get("head_size") or config["n_embd"] // max(1, heads)
        rows = {"q_proj": heads * size, "k_proj": groups * size, "v_proj": groups * size}
        enabled = [name for name, option in _ENABLED.items() if self._settings[option]]
        height = sum(rows[name] for name in enabled)
        if not enabled or A.shape[:1] != (rank * len(enabled),) or B.shape != (height, rank):
            raise AdapterError(
                f"{self._file}: {A.name} is {list(A.shape)} and {B.name} is {list(B.shape)}, expected "
                f"{rank * len(enabled)} rows and {[height, rank]} for {', '.join(enabled) or 'none of q, k and v'} (by "
                f"{_HYPERPARAMETERS} and {_MODEL})."
            )
        start = 0
        for number, name in enumerate(enabled):
            own = rows_of(A, number * rank, (number + 1) * rank)
            yield self._module(f"{path}.{name}", own, rows_of(B, start, start + rows[name]))
            start += rows[name]

    def _module(self, path: str, A: TensorRef, B: TensorRef) -> Module:
        if len(A.shape) != 2 or A.shape[0] != self._rank or B.shape[1:] != (self._rank,) or not self._rank:
            raise AdapterError(
                f"{self._file}: {A.name} is {list(A.shape)} and {B.name} is {list(B.shape)}, expected rank "
                f"{self._rank} (lora_r in {_HYPERPARAMETERS})."
            )
        return Module(path, self._rank, self._scaling, A, B)
