"""A result beside the whole model that it should be: an adapter that was extracted, or what it was merged into."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mapconv.adapter import Adapter
from mapconv.checkpoint.model_config import read_model_config
from mapconv.errors import AdapterError
from mapconv.fidelity.comparison import ModuleError, merged_by_peft, run_model
from mapconv.formats.peft import KEY_PREFIX
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.running import load_base
from mapconv.runtime.adapters import without_adapters
from mapconv.runtime.models import attach_with_peft, is_causal, load_model, longest_text, reads_text, text_classes


class ModelComparison:
    """The models of a verification against a model, loaded once; see ``comparison.Comparison``.

    Args:
        result: an adapter on its base, or the folder of a merged model.
        source: the model's folder.
        base: the base's folder.
        dtype: what the models compute in.
        device: where they run.
    """

    def __init__(
        self, result: PlacedAdapter | Path, source: Path, base: Path, *, dtype: str, device: torch.device
    ) -> None:
        self._device = device
        self._source = _load(source, dtype, device)
        self.is_causal = is_causal(self._source)
        self._peft: Any = None
        if isinstance(result, PlacedAdapter):
            model = load_base(result, dtype=dtype, device=device)
            self._peft = attach_with_peft(model, result.adapter.path, "result")
            self._result = self._peft
            # What PEFT wrote into the base's own parameters cannot be switched off again.
            shared = not _writes_into_base(result.adapter)
            self._base = None if shared else load_base(result, dtype=dtype, device=device)
        else:
            self._result, self._base = _load(result, dtype, device), _load(base, dtype, device)

    @property
    def reads_text(self) -> bool:
        return reads_text(self._source)

    @property
    def longest_text(self) -> int:
        return longest_text(self._source)

    @property
    def classes(self) -> dict[str, int] | None:
        return text_classes(type(self._source).__name__, self._source.config)

    def logits(self, block: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Logits (positions, classes) of base, source and result on one block; None where the model has none."""
        tokens = torch.tensor([block], device=self._device)
        source, result = run_model(self._source, tokens), run_model(self._result, tokens)
        if source is None or result is None:
            return None
        if self._base is None:
            with without_adapters(self._peft):
                base = run_model(self._peft, tokens)
        else:
            base = run_model(self._base, tokens)
        assert base is not None  # a model of the result's class
        return base, source, result

    def module_errors(self) -> Iterator[ModuleError]:
        """Every adapted weight as PEFT itself merges it, or every matrix of a model that differs from the base's."""
        wanted = dict(self._source.named_parameters(remove_duplicate=False))
        found = False
        for name, base, result in self._weights():
            source = wanted[name].detach()
            change = float((source.double() - base.double()).norm())
            if change:
                found = True
                path = name.removesuffix(".weight")
                yield ModuleError(path, float((result.double() - source.double()).norm()) / change)
        if not found:
            raise AdapterError("no weight of the source differs from the base's: there is nothing to compare.")

    def _weights(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(name, the base's, the result's) of each weight."""
        if self._peft is None:
            assert self._base is not None  # a merged model has its base beside it
            base = dict(self._base.named_parameters())
            for name, parameter in self._result.named_parameters():
                if parameter.ndim > 1 and name in base and base[name].shape == parameter.shape:
                    yield name, base[name].detach(), parameter.detach()
            return
        from peft.tuners.lora import LoraLayer

        for name, layer in self._peft.named_modules():
            if isinstance(layer, LoraLayer):
                parameter = getattr(layer, "parameter_name", "weight")
                base = getattr(layer.get_base_layer(), parameter).detach().clone()
                path = name.removeprefix(KEY_PREFIX).replace(".base_layer", "")
                yield f"{path}.{parameter}", base, merged_by_peft(layer, parameter, "result", base)


def _writes_into_base(adapter: Adapter) -> bool:
    return any(item.in_place for item in adapter.whole)


def _load(folder: Path, dtype: str, device: torch.device) -> Any:
    names = read_model_config(folder).get("architectures") or [None]
    return load_model(folder, names[0], dtype=dtype, device=device)
