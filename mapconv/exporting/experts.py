"""The layouts that an adapter's experts are written in, and the adapter's modules brought into one.

==========  ==========================================================================================================
split       one LoRA for each projection of each expert, under transformers 4's names: what vLLM reads
fused       PEFT's ``target_parameters`` on transformers 5's fused parameters: gate and up have one A of both ranks
tinker      three-dimensional stacks ``w1``, ``w2``, ``w3`` of all experts
sglang      three-dimensional stacks ``gate_up_proj``, ``down_proj`` of all experts
switch      those of MLX-LM, ``switch_mlp.gate_proj`` and so on
gguf        those of llama.cpp, ``ffn_gate_exps`` and so on
==========  ==========================================================================================================

All of them hold the same functions. A fused parameter that is split has each of its parts keep the whole rank; parts
that are fused have the sum of theirs, with a block-diagonal B. ``--rank`` cuts it, with ε measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mapconv.adapter import Module
from mapconv.checkpoint.derived import rows_of
from mapconv.checkpoint.stacks import Block, expert_rows, stacked
from mapconv.errors import UnsupportedError
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.expert_names import expert_names
from mapconv.placement.regions import StoredParameters
from mapconv.placement.skeleton import LiveModel, names_class, typed_model_config
from mapconv.placement.weights import PlacedModule, part_of

Layout = Literal["split", "fused", "tinker", "sglang", "switch", "gguf"]
#: Layouts of one tensor for all experts, which must therefore all be there and of one rank.
STACKED = ("tinker", "sglang", "switch", "gguf")


@dataclass(frozen=True)
class Relaid:
    """An adapter with its experts in a layout; by ``leaves`` of names ``target_modules`` may name all of them alone."""

    placed: PlacedAdapter
    leaves: frozenset[str] = frozenset()


def adapts_experts(placed: PlacedAdapter) -> bool:
    """Whether some of an adapter's modules are experts, in stacks or apart."""
    return any(item.experts > 1 or ".experts." in item.module.path for item in placed.modules)


def relaid(placed: PlacedAdapter, layout: Layout | None) -> Relaid:
    """The adapter with its experts in a layout; None leaves them as they are.

    Raises:
        UnsupportedError: experts that the layout, or the model's class, has no place for.
    """
    if layout is None or not adapts_experts(placed):
        return Relaid(placed)
    experts = _Experts(placed)
    if layout == "fused":
        return Relaid(experts.fused())
    result = experts.split()
    if layout in STACKED:
        experts.require_all(result)
    return Relaid(result, experts.common_leaves(result))


class _Experts:
    """The experts of one placed adapter, by the live parameters that they are parts of."""

    def __init__(self, placed: PlacedAdapter) -> None:
        config = placed.target.config or typed_model_config(placed.target.folder)
        named = config.get("architectures")
        name = placed.target.class_name or (named[0] if isinstance(named, list) and named else None)
        if name is None or not names_class(config):
            raise UnsupportedError(
                f"{placed.target.folder} has no config.json of a transformers model, whose class says how experts are "
                "stacked: leave --experts out."
            )
        self._placed, self._live = placed, LiveModel(config, name)
        self._names: dict[str, Mapping[tuple[int, int], str]] = {}

    def split(self) -> PlacedAdapter:
        """Every part of every expert as a module of its own."""
        modules = [part for item in self._placed.modules for part in self._parts(item)]
        settings = replace(self._placed.adapter.settings, target_parameters=())
        config = {name: value for name, value in self._placed.adapter.config.items() if name != "target_parameters"}
        adapter = replace(self._placed.adapter, settings=settings, config=config)
        return replace(self._placed, adapter=adapter, modules=tuple(modules))

    def fused(self) -> PlacedAdapter:
        """Every stacked parameter with all of its experts, one module."""
        groups: dict[str, list[tuple[int, int, PlacedModule]]] = defaultdict(list)
        kept: list[PlacedModule] = []
        for item in self._placed.modules:
            region = self._live.locate(f"{item.module.path}.weight")
            if item.experts == 1 and region.index is not None:
                groups[region.parameter].append((region.index, region.part, item))
            else:
                kept.append(item)
        mixed = next((item for item in kept if item.experts > 1), None)
        if not groups:
            return self._placed
        if mixed is not None:
            raise UnsupportedError(
                f"{mixed.module.path} is a stack of experts already, while others are apart: split them first "
                "(--experts split)."
            )
        stored = StoredParameters(
            {name: self._live.locate(name) for name in self._placed.target.tensors}, self._placed.target.tensors
        )
        for parameter, parts in groups.items():
            kept += self._stack(parameter, parts, _path(self._live, parameter, groups), stored)
        settings = replace(self._placed.adapter.settings, target_parameters=tuple(groups))
        targets = _shortened(groups, [name for name, shape in self._live.shapes.items() if len(shape) == 3])
        config = self._placed.adapter.config | {"target_parameters": targets}
        adapter = replace(self._placed.adapter, settings=settings, config=config)
        return replace(self._placed, adapter=adapter, modules=tuple(kept))

    def require_all(self, split: PlacedAdapter) -> None:
        """Refuse an adapter that leaves some experts of a stack alone."""
        own = {f"{item.module.path}.weight" for item in split.modules}
        for parameter, names in self._known(split).items():
            for part in {part for _, part in names}:
                stack = [name for (_, other), name in names.items() if other == part]
                missing = [name for name in stack if name not in own]
                if missing and len(missing) < len(stack):
                    raise UnsupportedError(
                        f"{self._placed.adapter.path} adapts {len(stack) - len(missing)} of {len(stack)} experts in "
                        f"{parameter}, and a stack holds all of them: choose --experts split or --experts fused."
                    )

    def common_leaves(self, split: PlacedAdapter) -> frozenset[str]:
        """The last parts of the experts' names, where these name all experts of the model and nothing else."""
        own = {item.module.path for item in split.modules}
        stacks = [name for name, shape in self._live.shapes.items() if len(shape) == 3 and ".experts." in name]
        experts = {name.removesuffix(".weight") for stack in stacks for name in self._named(stack).values()}
        leaves = {path.rpartition(".")[2] for path in own & experts}
        others = {path for path in self._live.adaptable_paths() if path.rpartition(".")[2] in leaves}
        everyone = {path for path in experts if path.rpartition(".")[2] in leaves}
        return frozenset(leaves if everyone | others <= own else ())

    def _known(self, split: PlacedAdapter) -> dict[str, Mapping[tuple[int, int], str]]:
        regions = [self._live.locate(f"{item.module.path}.weight") for item in split.modules]
        return {region.parameter: self._named(region.parameter) for region in regions if region.index is not None}

    def _named(self, parameter: str) -> Mapping[tuple[int, int], str]:
        if parameter not in self._names:
            self._names[parameter] = expert_names(self._live, parameter)
        return self._names[parameter]

    def _parts(self, item: PlacedModule) -> Iterator[PlacedModule]:
        if item.experts == 1:
            yield item
            return
        names = self._named(item.parameter)
        if not names:
            raise UnsupportedError(
                f"{item.parameter} was always one tensor for all experts, which have no names of their own: leave "
                "--experts out."
            )
        assert item.expert is not None
        module, rank, count = item.module, item.rank, 1 + max(part for _, part in names)
        rows = item.weight.shape[0] // count
        for part in range(count):
            start, stop = part * rows, (part + 1) * rows
            name = names[item.expert, part]
            A = rows_of(module.lora_A, item.expert * rank, (item.expert + 1) * rank)
            B = expert_rows(module.lora_B, rank, item.expert, start, stop)
            own = Module(name.removesuffix(".weight"), rank, item.scaling, A, B)
            yield PlacedModule(own, part_of(item.weight, start, stop), name, rank, item.scaling)

    def _stack(
        self, parameter: str, parts: Iterable[tuple[int, int, PlacedModule]], path: str, stored: StoredParameters
    ) -> Iterator[PlacedModule]:
        experts, transposed = self._live.shapes[parameter][0], self._live.stores_in_by_out(parameter.rpartition(".")[0])
        views = [stored.expert(parameter, expert, transposed=transposed) for expert in range(experts)]
        ordered = sorted(parts, key=lambda entry: entry[:2])
        count = self._live.locate(f"{ordered[0][2].module.path}.weight").parts
        height = views[0].shape[0]
        blocks, used = [], dict.fromkeys(range(experts), 0)
        for expert, part, item in ordered:
            if item.module.magnitude is not None or item.module.delta is not None or item.module.method is not None:
                raise UnsupportedError(
                    f"{item.module.path} is no plain LoRA, and PEFT has no other form for a stack of experts: convert "
                    "the adapter with `mapconv upgrade --lora-compatible` first."
                )
            first = part * height // count
            blocks.append(
                Block(item.module.lora_A, item.module.lora_B, expert, used[expert], first, scale=item.scaling)
            )
            used[expert] += item.rank
        rank = max(used.values())
        A, B = stacked(path, blocks, experts=experts, rank=rank, height=height)
        module = Module(path, experts * rank, 1.0, A, B)
        for expert, view in enumerate(views):
            yield PlacedModule(module, view, parameter, rank, 1.0, expert=expert, experts=experts)


def _path(live: LiveModel, parameter: str, targets: Iterable[str]) -> str:
    """PEFT's name of the module that wraps a parameter: the last one is outermost, the others are its base layers."""
    parent = parameter.rpartition(".")[0]
    wrapped = [name for name in (f"{parent}.{leaf}" for leaf in live.own_parameters(parent)) if name in set(targets)]
    return parent + ".base_layer" * (len(wrapped) - 1 - wrapped.index(parameter))


def _shortened(parameters: Iterable[str], known: Iterable[str]) -> list[str]:
    """``experts.gate_up_proj`` for the parameters of all layers, where it names no others."""
    own = set(parameters)
    ends = {".".join(name.rsplit(".", 2)[1:]) for name in own}
    return sorted(ends if all(name in own for name in known if name.endswith(tuple(f".{e}" for e in ends))) else own)
