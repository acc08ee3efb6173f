"""Place an adapter on a base whose class is unknown: by exact names, and by the shapes that its factors can fit.

A factor's keys and dimensions say what kind of layer it was trained on, and PEFT's own record (``fan_in_fan_out``) what
a square weight does not show. Where both leave a choice, the adapter is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Literal

from mapconv.adapter import Adapter, Module, TensorRef
from mapconv.errors import PlacementError, UnsupportedError
from mapconv.placement.agreement import attention_refusal, on_stack, on_weight, require_bijection
from mapconv.placement.by_name import best_renaming, misfit_report, nearest, require_all_targets, tensor_name
from mapconv.placement.weights import Piece, PlacedModule, WeightView

Form = Literal["linear", "transposed", "conv", "embedding", "stack", "stack-transposed"]
_WRAPPER = ".base_layer"


class ShapePlacement:
    """One adapter's names in a base, and its modules on the base's tensors."""

    def __init__(self, adapter: Adapter, tensors: Mapping[str, TensorRef]) -> None:
        self.adapter, self.tensors = adapter, tensors
        self._renaming = best_renaming([_inner(module) for module in adapter.modules], tensors)
        self._leaves: dict[str, list[str]] = defaultdict(list)
        for name in tensors:
            parent, _, leaf = name.rpartition(".")
            self._leaves[parent].append(leaf)

    def stored_name(self, parameter: str) -> str:
        """What the base calls a parameter of the adapter; a name that it has not got where it has none."""
        path, _, leaf = parameter.rpartition(".")
        return tensor_name(path, self._renaming, self.tensors, leaf)

    def knows(self, module: Module) -> bool:
        """Whether the base has a parameter of the module's own name."""
        return bool(self._options(module))

    def modules(self) -> tuple[PlacedModule, ...]:
        """Every module on its tensor; a stack of experts gives one placed module for each.

        Raises:
            PlacementError: modules without a tensor that they fit, or with more than one way to fit it.
        """
        found: list[tuple[Module, str, list[Form]]] = []
        misfits: list[str] = []
        for module in self.adapter.modules:
            if module.method is not None:
                raise UnsupportedError(
                    f"{self.adapter.path} is of the method {module.method.name}, which needs the model's class to be "
                    "placed: give a base with the config.json of a transformers model."
                )
            fits = self._fits(module)
            if len(fits) == 1:
                found.append((module, *fits[0]))
            else:
                misfits.append(self._misfit(module, [parameter for parameter, _ in fits]))
        if not misfits:
            try:
                return self._placed(found)
            except PlacementError as error:
                misfits.append(str(error))
        raise PlacementError(misfit_report(misfits, len(self.adapter.modules)))

    def _placed(self, found: list[tuple[Module, str, list[Form]]]) -> tuple[PlacedModule, ...]:
        decided = self._decided_forms(found)
        placed = [
            item
            for module, parameter, forms in found
            for item in self._place(module, parameter, self._one_form(module, parameter, forms, decided))
        ]
        require_bijection(placed)
        self._require_all_targets({_inner(module) for module, *_ in found})
        return tuple(placed)

    def _fits(self, module: Module) -> list[tuple[str, list[Form]]]:
        """(parameter, forms in which the module fits it) of every parameter that the module can mean."""
        options = ((name, self._forms(module, name, name in self._targeted(module))) for name in self._options(module))
        return [(name, forms) for name, forms in options if forms]

    def _options(self, module: Module) -> list[str]:
        weight, inputs = (f"{_inner(module)}.{leaf}" for leaf in ("weight", "in_proj_weight"))
        if self.stored_name(inputs) in self.tensors:
            raise attention_refusal(module.path)
        return self._targeted(module) or [weight] * (self.stored_name(weight) in self.tensors)

    def _targeted(self, module: Module) -> list[str]:
        """The parameters of the module that ``target_parameters`` names."""
        inner = _inner(module)
        parent = self.stored_name(f"{inner}.weight").rpartition(".")[0]
        targets = self.adapter.settings.target_parameters
        names = (f"{inner}.{leaf}" for leaf in self._leaves[parent])
        return [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]

    def _forms(self, module: Module, parameter: str, targeted: bool) -> list[Form]:
        """The ways to store a weight under which the module's factors fit the stored tensor."""
        shape, (height, width) = self.tensors[self.stored_name(parameter)].shape, module.weight_shape
        if module.embedding:
            return ["embedding"] if shape == (width, height) else []
        if len(module.lora_A.shape) > 2:
            return ["conv"] if shape == (height, *module.lora_A.shape[1:]) else []
        forms: dict[Form, tuple[int, ...]] = {"linear": (height, width), "transposed": (width, height)}
        if targeted and len(shape) == 3:
            forms = {"stack": (shape[0], height, width), "stack-transposed": (shape[0], width, height)}
        elif targeted:
            del forms["transposed"]  # PEFT takes a matrix that is named as a parameter for (out, in)
        return [form for form, expected in forms.items() if shape == expected]

    def _decided_forms(self, found: list[tuple[Module, str, list[Form]]]) -> dict[str, set[Form]]:
        """What the weights that are not square tell of the square ones: by experts' module, and of all matrices."""
        decided: dict[str, set[Form]] = defaultdict(set)
        for module, _, forms in found:
            if len(forms) == 1:
                decided[_inner(module) if forms[0].startswith("stack") else ""].add(forms[0])
        return decided

    def _one_form(self, module: Module, parameter: str, forms: list[Form], decided: dict[str, set[Form]]) -> Form:
        if len(forms) == 1:
            return forms[0]
        if forms[0] == "linear":
            # PEFT notes the kind of the layer that it wrapped last, so one record speaks for all where all are alike.
            recorded: Form = "transposed" if self.adapter.config.get("fan_in_fan_out") else "linear"
            if not decided[""] & {"linear", "transposed"} - {recorded}:
                return recorded
        elif len(decided[_inner(module)]) == 1:
            return next(iter(decided[_inner(module)]))
        shape = list(self.tensors[self.stored_name(parameter)].shape)
        raise PlacementError(
            f"{module.path}: {parameter} is square ({shape}), and only the model's class tells whether it is stored as "
            "(out, in) or (in, out): give a base with its config.json"
        )

    def _place(self, module: Module, parameter: str, form: Form) -> Iterator[PlacedModule]:
        ref = self.tensors[self.stored_name(parameter)]
        pattern_name = parameter if parameter in self._targeted(module) else None
        if form.startswith("stack"):
            transposed = form == "stack-transposed"
            views = [_expert(ref, expert, transposed=transposed) for expert in range(ref.shape[0])]
            yield from on_stack(module, self.adapter, parameter, views)
            return
        height, width = module.weight_shape
        transposed = form in ("transposed", "embedding")
        view = WeightView((height, width), (Piece(ref, 0, height, transposed=transposed),))
        yield on_weight(module, self.adapter, parameter, view, pattern_name=pattern_name)

    def _misfit(self, module: Module, fitting: list[str]) -> str:
        if fitting:
            return f"{module.path}: it fits {' and '.join(fitting)} alike, and only the model's class tells them apart"
        expected = list(module.weight_shape)
        present = [self.stored_name(name) for name in self._options(module)]
        if present:
            shapes = " and ".join(f"{name} is {list(self.tensors[name].shape)}" for name in present)
            return f"{module.path}: {shapes}, the adapter expects {expected}"
        name = self.stored_name(f"{_inner(module)}.weight")
        return f"{module.path}: no tensor {name}{nearest(name, self.tensors)}"

    def _require_all_targets(self, placed: set[str]) -> None:
        saved = [f".{name}." for name in self.adapter.settings.modules_to_save]
        names = [name for name, ref in self.tensors.items() if name.endswith(".weight") and len(ref.shape) > 1]
        paths = [self._renaming.to_adapter(name.removesuffix(".weight")) for name in names]
        paths = [path for path in paths if not any(name in f".{path}." for name in saved)]
        require_all_targets(self.adapter.config, placed, paths)


def _inner(module: Module) -> str:
    """The module's path without PEFT's wrappers."""
    return module.path.replace(_WRAPPER, "")


def _expert(ref: TensorRef, index: int, *, transposed: bool) -> WeightView:
    height, width = ref.shape[1:][::-1] if transposed else ref.shape[1:]
    return WeightView((height, width), (Piece(ref, 0, height, index, stacked=True, transposed=transposed),))
