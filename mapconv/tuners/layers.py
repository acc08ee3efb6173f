"""One base weight at a time inside the layer that stock PEFT builds for a method, merged by the method's own code.

A layer is injected into a skeleton that holds it at its place and nothing else. Where layers share tensors or depend on
each other, the skeleton holds all of them, around weights that take no memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from threading import Lock
from typing import Any

import torch

from mapconv.adapter import TensorRef
from mapconv.algebra.norms import all_finite
from mapconv.checkpoint.reader import TensorReader
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.methods import METHODS
from mapconv.runtime.memory import trim
from mapconv.runtime.models import quiet_libraries, translated
from mapconv.tuners.config import by_name, tuner_config
from mapconv.tuners.injection import ADAPTER, inject
from mapconv.tuners.sites import GROUP_BYTES, Site, base_layer, chunks, hold, keyed, weightless

#: PEFT and the warnings filter that silences it have state of the process.
_BUILDING = Lock()


class TunerLayers:
    """The layers of one adapter; safe to call from several threads.

    Args:
        reader: what the adapter's tensors are read with.
        sites: every adapted layer, in the model's own order.
    """

    def __init__(self, reader: TensorReader, sites: Sequence[Site]) -> None:
        method = sites[0].module.method
        assert method is not None  # only layers of another method than LoRA come here
        self._reader, self._method = reader, method
        self._sites = {site.path: site for site in sites}
        self._facts = METHODS[str(method.config["peft_type"]).upper()]
        self._together: dict[str, torch.nn.Module] | None = None
        self._groups: dict[str, list[Site]] | None = None
        #: Layers that are built, and not merged yet.
        self._waiting: dict[str, Any] = {}
        #: Bytes of weights that were merged since freed memory went back to the system.
        self._merged_bytes = 0

    @torch.no_grad()
    def merged(
        self, path: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight and the bias of a layer, merged by PEFT.

        Args:
            path: of the module.
            weight: float32, as the layer holds it (``Site.shape``); it may be overwritten.
            bias: (out,) float32, or None.

        Raises:
            AdapterError: the layer cannot be built from the adapter's tensors and configuration.
        """
        site = self._sites[path]
        scalars = site.module.map_scalars
        base_weight = None if scalars is None else weight.clone()
        with self._explained(path):
            layer = self._layer(site, weight, bias)
            layer.merge(adapter_names=[ADAPTER])
            base = layer.get_base_layer()
            merged, merged_bias = base.weight.detach(), getattr(base, "bias", None)
            if self._together is not None:
                hold(base, weightless(site.shape), None)
        if merged_bias is not None and not site.has_bias and merged_bias.any():
            raise UnsupportedError(
                f"{self._method.file.parent}: {self._method.name} gives {path} a bias, but the base has none, so that "
                "no merged model of its class can hold it."
            )
        if scalars is not None and base_weight is not None:
            merged = _in_map_form(merged, base_weight, *scalars)
        if not all_finite(merged):
            raise AdapterError(
                f"{self._method.file.parent}: the merged weight of {path} holds NaN or infinity: the training run "
                "diverged, or this is not the base that it ran on."
            )
        return merged, None if merged_bias is None else merged_bias.detach()

    def check(self) -> None:
        """Build layers without memory or values, to hold names and shapes of the file against PEFT's.

        Of layers that do not differ in these, nor in what the configuration says of them by name, one is built. Layers
        that PEFT derives from the base's values are checked when they are merged.
        """
        if self._facts.reads_base:
            return
        if self._facts.together:
            self._check([*self._sites.values()])
            return
        for sites in self._alike():
            named = by_name(self._method, [site.path for site in sites])
            kinds: dict[object, Site] = {}
            for site, said in zip(sites, named, strict=True):
                kinds.setdefault((site.kind, site.shape, site.has_bias, _shapes(site), said), site)
            try:
                self._check([*kinds.values()])
            except AdapterError:
                for site in kinds.values():
                    self._check([site])  # which names the layer
                raise

    def _check(self, sites: Sequence[Site]) -> None:
        with self._explained(sites[0].path):
            model = self._injected({site.path: base_layer(site) for site in sites}, without_values=True)
            self._require_all(model, [ref for site in sites for ref in keyed(site)])

    def _alike(self) -> list[list[Site]]:
        """The layers in groups that one configuration serves: an allocator's rank is one field of it."""
        groups: dict[int, list[Site]] = defaultdict(list)
        for site in sorted(self._sites.values(), key=lambda site: site.position):
            groups[site.module.rank].append(site)
        return list(groups.values())

    def _layer(self, site: Site, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        """The layer with the adapter's tensors, around a weight."""
        with _BUILDING:
            self._give_memory_back(site)
            if self._facts.reads_base:
                base = hold(base_layer(site), weight, bias)
                return self._built({site.path: base}, [site])[site.path]
            if not self._facts.together:
                if site.path not in self._waiting:
                    self._waiting |= self._built_around_nothing(self._next(site))
                layer: Any = self._waiting.pop(site.path)
            else:
                if self._together is None:
                    self._together = self._built_around_nothing([*self._sites.values()])
                layer = self._together[site.path]
        hold(layer.get_base_layer(), weight, bias)
        return layer

    def _give_memory_back(self, site: Site) -> None:
        """Now and then: a weight that comes after others fits in none of the places that they left."""
        self._merged_bytes += site.weight_bytes
        if self._merged_bytes > GROUP_BYTES:
            self._merged_bytes = 0
            trim()

    def _next(self, site: Site) -> list[Site]:
        """A layer, and those after it that are built with it, because PEFT takes as long for one as for several."""
        if self._groups is None:
            self._groups = {other.path: group for alike in self._alike() for group in chunks(alike) for other in group}
        # A layer that is merged again is built alone.
        group = self._groups.pop(site.path, [site])
        for other in group:
            self._groups.pop(other.path, None)
        return group

    def _built_around_nothing(self, sites: Sequence[Site]) -> dict[str, Any]:
        return self._built({site.path: base_layer(site) for site in sites}, sites)

    def _built(self, bases: Mapping[str, torch.nn.Module], sites: Iterable[Site]) -> dict[str, Any]:
        """The layers around ``bases``, with every tensor of the adapter in its place."""
        from peft import set_peft_model_state_dict

        model = self._injected(bases)
        expected = self._require_all(model, [entry for site in sites for entry in keyed(site)])
        # A layer's copy of a tensor that all share is the same object in memory: one of them is enough.
        own = [entry for site in sites for entry in keyed(site) if self._shared_key(entry[0]) not in expected]
        shared = [(key, ref) for key, ref in self._method.shared.items() if key in expected]
        tensors = {key: self._read(ref) for key, ref in (*own, *shared)}
        with quiet_libraries():
            set_peft_model_state_dict(model, tensors, adapter_name=ADAPTER)
            if self._facts.together and self._facts.reads_base:
                # A part of the layer comes from its weight and from shared tensors, which are those of the file now.
                self._make_again(model, bases)
                set_peft_model_state_dict(model, tensors, adapter_name=ADAPTER)
        modules = dict(model.base_model.model.named_modules())
        return {path: modules[path] for path in bases}

    @staticmethod
    def _shared_key(key: str) -> str:
        return f"base_model.{key.rpartition('.')[2]}"

    @staticmethod
    def _make_again(model: Any, paths: Iterable[str]) -> None:
        """Let PEFT derive anew what it derives when it makes a layer."""
        tuner = model.base_model
        for path in paths:
            parent = tuner.model.get_submodule(path.rpartition(".")[0])
            layer, name = tuner.model.get_submodule(path), path.rpartition(".")[2]
            tuner._create_and_replace(tuner.peft_config[ADAPTER], ADAPTER, layer, name, parent, current_key=path)

    def _injected(self, bases: Mapping[str, torch.nn.Module], *, without_values: bool = False) -> Any:
        """A PeftModel of a skeleton that holds ``bases`` at their paths."""
        config = tuner_config(self._method, [self._sites[path].module for path in bases])
        return inject(bases, config, without_values=without_values)

    def _require_all(self, model: Any, given: Sequence[tuple[str, TensorRef]]) -> Mapping[str, Any]:
        """Hold the tensors of layers against what PEFT would save of them; returns PEFT's."""
        from peft import get_peft_model_state_dict

        with quiet_libraries():
            expected = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
        if self._facts.together and self._facts.reads_base and not self._method.shared:
            raise UnsupportedError(
                f"{self._method.file}: this {self._method.name} adapter lacks what PEFT derived from all base weights "
                "at once: save it with save_projection=True."
            )
        file, tensors = self._method.file.parent, dict(given) | dict(self._method.shared)
        own = [key for key, _ in given]
        for key in expected.keys() - tensors.keys():
            raise AdapterError(f"{file}: {key} is missing: the adapter is incomplete.")
        for key in (key for key in own if key not in expected):
            raise AdapterError(f"{file}: {tensors[key].name} is not a tensor of PEFT's {self._method.name} layers.")
        for key, value in expected.items():
            if tuple(value.shape) != tensors[key].shape:
                raise AdapterError(
                    f"{tensors[key].file}: {tensors[key].name} is {list(tensors[key].shape)}, expected "
                    f"{list(value.shape)} on this base, by {self._method.file.name}."
                )
        return expected

    def _read(self, ref: TensorRef) -> torch.Tensor:
        tensor = self._reader.read(ref)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise AdapterError(f"{ref.file}: tensor {ref.name} holds NaN or infinity: the training run diverged.")
        return tensor

    def _explained(self, path: str):
        return translated(f"{self._method.name} layer {path} of {self._method.file.parent}", AdapterError)


def _in_map_form(merged: torch.Tensor, base: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """α·W0/‖W0‖ + β·Δ/‖Δ‖ with Δ = ``merged`` − W0; a norm of 0 has no direction."""
    delta = merged - base
    base_norm, length = float(base.double().norm()), float(delta.double().norm())
    return base.mul_(alpha / base_norm if base_norm else 1.0).add_(delta, alpha=beta / length if length else 0.0)


def _shapes(site: Site) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, ref.shape) for name, ref in site.module.own)
