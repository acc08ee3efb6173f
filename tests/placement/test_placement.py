"""Where modules land: names with and without a prefix, misfits with the nearest names, targets that are missing."""

from __future__ import annotations

import pytest

from mapconv.errors import PlacementError
from mapconv.placement.by_name import Renaming, linear_paths, place, require_all_targets

SHAPE = (8, 4)
PATHS = [f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in ("q_proj", "v_proj")]
MODULES = dict.fromkeys(PATHS, SHAPE)
TENSORS = {f"{path}.weight": SHAPE for path in PATHS} | {"model.norm.weight": (4,), "lm_head.weight": (16, 4)}


def renamed(rename) -> dict[str, tuple[int, ...]]:
    return {rename(name): shape for name, shape in TENSORS.items()}


def test_equal_names():
    placed, renaming = place(MODULES, TENSORS)
    assert placed == {path: f"{path}.weight" for path in PATHS}
    assert renaming == Renaming()


def test_a_checkpoint_without_the_prefix():
    placed, _ = place(MODULES, renamed(lambda name: name.removeprefix("model.")))
    assert placed == {path: f"{path.removeprefix('model.')}.weight" for path in PATHS}


def test_an_adapter_without_the_prefix():
    modules = {path.removeprefix("model."): SHAPE for path in PATHS}
    placed, _ = place(modules, TENSORS)
    assert placed == {path: f"model.{path}.weight" for path in modules}


@pytest.mark.parametrize("bare", [True, False])
def test_a_head_lies_outside_the_prefix(bare):
    tensors = renamed(lambda name: name.removeprefix("model.")) if bare else TENSORS
    placed, _ = place(MODULES | {"lm_head": (16, 4)}, tensors)
    assert placed["lm_head"] == "lm_head.weight"


def test_one_renaming_serves_the_whole_adapter():
    """A module that would fit under another prefix than the rest is a misfit, not a lucky find."""
    tensors = dict(TENSORS)
    del tensors[f"{PATHS[0]}.weight"]
    tensors[f"{PATHS[0].removeprefix('model.')}.weight"] = SHAPE
    with pytest.raises(PlacementError, match="1 of the adapter's 6 modules"):
        place(MODULES, tensors)


def test_no_module_fits():
    with pytest.raises(PlacementError, match="6 of the adapter's 6 modules"):
        place(MODULES, {"transformer.h.0.attn.c_attn.weight": SHAPE})


def test_misfits_are_listed_with_the_nearest_names_of_the_same_layer():
    tensors = renamed(lambda name: name.replace("layers.1.self_attn.v_proj", "layers.1.self_attn.v_project"))
    with pytest.raises(PlacementError) as caught:
        place(MODULES, tensors)
    lines = str(caught.value).splitlines()
    assert "1 of the adapter's 6 modules" in lines[0]
    assert lines[1].startswith("  model.layers.1.self_attn.v_proj: no tensor model.layers.1.self_attn.v_proj.weight")
    assert "model.layers.1.self_attn.v_project.weight" in lines[1]
    assert "layers.0" not in lines[1]


def test_a_long_list_of_misfits_is_cut():
    modules = {f"model.layers.{layer}.mlp.up": SHAPE for layer in range(40)}
    with pytest.raises(PlacementError) as caught:
        place(modules, TENSORS)
    assert len(str(caught.value).splitlines()) == 7
    assert "and 35 more" in str(caught.value)


def test_wrong_shapes_say_both():
    with pytest.raises(PlacementError, match=r"v_proj.weight is \[8, 4\], the adapter expects \[8, 5\]"):
        place(MODULES | {PATHS[1]: (8, 5)}, TENSORS)


def test_two_modules_on_one_tensor():
    modules = MODULES | {PATHS[0].removeprefix("model."): SHAPE}
    tensors = renamed(lambda name: name.removeprefix("model."))
    with pytest.raises(PlacementError, match=f"is adapted by {PATHS[0]} already"):
        place(modules, tensors)


class TestTargets:
    """What the configuration says is adapted, and the file lacks."""

    def check(self, config, modules=MODULES, tensors=TENSORS):
        placed, renaming = place(modules, tensors)
        require_all_targets(config, placed, [renaming.to_adapter(path) for path in linear_paths(tensors)])

    def test_all_there(self):
        self.check({"target_modules": ["q_proj", "v_proj"]})

    @pytest.mark.parametrize("bare", [True, False])
    def test_a_missing_module_is_named_as_the_adapter_would(self, bare):
        tensors = renamed(lambda name: name.removeprefix("model.")) if bare else TENSORS
        modules = {path: SHAPE for path in PATHS if path != PATHS[3]}
        with pytest.raises(PlacementError, match=rf"1 module that.*\n  {PATHS[3]}: no tensors in the file"):
            self.check({"target_modules": ["q_proj", "v_proj"]}, modules, tensors)

    def test_a_whole_type_is_missing(self):
        modules = {path: SHAPE for path in PATHS if path.endswith("q_proj")}
        with pytest.raises(PlacementError, match="3 modules"):
            self.check({"target_modules": ["q_proj", "v_proj"]}, modules)
        self.check({"target_modules": ["q_proj"]}, modules)

    def test_a_target_ends_at_a_dot(self):
        self.check({"target_modules": ["q_proj", "v_proj", "proj", "norm", "attn.q_proj"]})

    @pytest.mark.parametrize(
        "config",
        [
            {},
            {"target_modules": None},
            {"target_modules": "all-linear"},
            {"target_modules": [1, 2]},
            {"target_modules": ["q_proj", "v_proj", "lm_head"], "exclude_modules": ["lm_head"]},
            {"target_modules": ["q_proj", "v_proj", "lm_head"], "layers_to_transform": [0]},
        ],
    )
    def test_rules_that_need_the_model_itself_are_left_to_peft(self, config):
        self.check(config)
