"""Every method of the installed PEFT besides LoRA: merged and refitted, with stock PEFT's own merge as the judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.fidelity.comparison import Comparison
from mapconv.formats.methods import METHODS, NO_FIXED_WEIGHT, WHOLE_METHODS
from mapconv.placement.adapters import place_adapter

from .bases import copy_of, reloaded
from .methods import CASES, MethodCase, merged_by_peft, model_folder

#: One rounding to float32, relative.
ROUNDING = 2.0**-24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, adapter, stock PEFT's merged state) of a case; each is made once."""
    root, known = tmp_path_factory.mktemp("methods"), {}

    def make(case: MethodCase) -> tuple[Path, Path, dict[str, torch.Tensor]]:
        if case.name not in known:
            base, adapter = model_folder(case.tiny, root / case.tiny.name), root / case.name
            known[case.name] = base, adapter, case.make(base, adapter)
        return known[case.name]

    return make


def the(method: str) -> MethodCase:
    return next(case for case in CASES if case.method == method)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_merges_to_what_peft_merges_to_and_converts_to_the_same(case, made, tmp_path):
    base, adapter, wanted = made(case)
    mapconv.merge(adapter, tmp_path / "merged", base=base, dtype="float32")
    before, got = copy_of(case.tiny, base).state_dict(), reloaded(case.tiny, tmp_path / "merged", base).state_dict()
    changed = [name for name in wanted if not torch.equal(wanted[name], before[name])]
    assert changed
    for name in wanted:
        assert distance(got[name], wanted[name]) <= 1e-6 * distance(wanted[name], before[name]), name
    if case.method in WHOLE_METHODS:
        with pytest.raises(UnsupportedError, match="merge it"):
            mapconv.upgrade(adapter, tmp_path / "map", base=base)
        return
    # The weights are 16 wide, so that rank 16 leaves nothing out; a known low rank must suffice.
    full = METHODS[case.method].rank is None or case.variant.get("init_weights") == "bat"
    if full:
        with pytest.raises(UnsupportedError, match="give --rank or --tolerance"):
            mapconv.upgrade(adapter, tmp_path / "map", base=base)
    result = mapconv.upgrade(adapter, tmp_path / "map", base=base, rank=16 if full else None)
    refitted = merged_by_peft(case.tiny, base, tmp_path / "map")
    for name in wanted:
        # T − W0 is formed from a rounded T, and the factors are rounded as well.
        assert distance(refitted[name], wanted[name]) <= 8 * ROUNDING * float(wanted[name].norm()), name
    assert result.worst_error <= 1e-4


def test_every_method_of_peft_is_merged_or_refused_by_name():
    known = METHODS.keys() | WHOLE_METHODS.keys() | NO_FIXED_WEIGHT.keys() | {"LORA"}
    assert known == {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


@pytest.mark.parametrize("method", sorted(NO_FIXED_WEIGHT))
def test_a_method_without_a_merge_is_refused_by_name(method, tmp_path):
    save_file({"prompt_embeddings": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": method}))
    with pytest.raises(UnsupportedError, match=f'"{method}", which has no merge: '):
        mapconv.inspect(tmp_path)


def test_weights_scale_an_update(made, tmp_path):
    base, adapter, wanted = made(the("OFT"))
    mapconv.merge(adapter, tmp_path / "half", base=base, weights=[0.5], dtype="float32")
    before, half = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "half"))
    for name, value in half.items():
        assert torch.allclose(value, (before[name] + wanted[name]) / 2, atol=1e-6), name


def test_two_of_them_on_one_weight_are_refused(made, tmp_path):
    (base, oft, _), (_, loha, _) = made(the("OFT")), made(the("LOHA"))
    with pytest.raises(UnsupportedError, match=r"both adapt .*changes the weight as a whole"):
        mapconv.merge([oft, loha], tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()


def test_inspect_names_the_method(made):
    base, adapter, _ = made(the("LOHA"))
    found = mapconv.inspect(adapter, base=base)
    assert (found.method, found.modules, found.fits) == ("LoHa", 3, base)
    assert {group.module_type: group.shapes for group in found.targets}["q_proj"] == ((16, 16),)


def test_weights_are_compared_with_those_of_a_source_of_another_method(made, tmp_path):
    base, adapter, _ = made(the("HRA"))
    mapconv.upgrade(adapter, tmp_path / "map", base=base)
    source = place_adapter(adapter, base)
    comparison = Comparison(tmp_path / "map", source, dtype="float32", device=torch.device("cpu"))
    errors = list(comparison.module_errors())
    assert len(errors) == 3
    assert max(item.error for item in errors) <= 1e-5


def test_there_is_no_dora_to_keep(made, tmp_path):
    base, adapter, _ = made(the("HRA"))
    with pytest.raises(UnsupportedError, match="leave --direction dora out"):
        mapconv.upgrade(adapter, tmp_path / "map", base=base, direction="dora")


def test_what_needs_factors_says_how_to_get_them(made, tmp_path):
    base, adapter, _ = made(the("HRA"))
    with pytest.raises(UnsupportedError, match=r"HRA, which has no factors .*`mapconv upgrade`"):
        mapconv.rebase(adapter, tmp_path / "out", base=base, onto=base, statistics="none")
    with pytest.raises(UnsupportedError, match="HRA: its layers do not add"):
        mapconv.load_adapter(the("HRA").tiny.load(base), adapter)
    assert not (tmp_path / "out").exists()


def test_scales_of_rows_are_the_magnitudes_of_a_dora(tmp_path):
    case = MethodCase("IA3", "Linear", {"feedforward_modules": []})
    base = model_folder(case.tiny, tmp_path / "base")
    wanted = case.make(base, tmp_path / "ia3")
    result = mapconv.upgrade(tmp_path / "ia3", tmp_path / "map", base=base, direction="dora")
    assert {(module.direction, module.rank) for module in result.modules} == {("dora", 1)}
    assert result.worst_error <= 1e-6
    with pytest.raises(UnsupportedError, match="keeps IA3's own values"):
        mapconv.upgrade(tmp_path / "ia3", tmp_path / "cut", base=base, direction="dora", rank=1)
    mapconv.merge(result.out, tmp_path / "merged", base=base, dtype="float32")
    states = merged_by_peft(case.tiny, base, result.out), case.tiny.load(tmp_path / "merged").state_dict()
    for state in states:
        for name in wanted:
            assert distance(state[name], wanted[name]) <= 8 * ROUNDING * float(wanted[name].norm()), name


def test_scales_of_columns_are_refitted_beside_those_of_rows(made, tmp_path):
    base, adapter, wanted = made(the("IA3"))
    result = mapconv.upgrade(adapter, tmp_path / "map", base=base, direction="dora")
    found = {module.path: module for module in result.modules}
    assert {module.direction for module in result.modules} == {"dora"}
    before, after = load_file(base / "model.safetensors"), merged_by_peft(the("IA3").tiny, base, result.out)
    for path, module in found.items():
        name = f"{path}.weight"
        update = float((wanted[name] - before[name].double()).norm())
        assert module.rank == (16 if path.endswith("down_proj") else 1)
        assert float((after[name] - wanted[name]).norm()) == pytest.approx(module.error * update, abs=1e-5 * update)
    assert any(
        note.startswith("IA3 scales the inputs of 1 module, as no DoRA does: refitted at rank 16 (--rank")
        for note in result.notes
    )
    for number, (limits, rank) in enumerate([({"rank": 3}, 3), ({"tolerance": 0.9}, 1)]):
        limited = mapconv.upgrade(adapter, tmp_path / str(number), base=base, direction="dora", **limits)
        assert {module.rank for module in limited.modules} == {1, rank}


def test_a_method_of_low_rank_is_exported_exactly(made, tmp_path):
    case = the("HRA")
    base, adapter, wanted = made(case)
    mapconv.export(adapter, tmp_path / "lora", base=base, to="peft")
    exported = merged_by_peft(case.tiny, base, tmp_path / "lora")
    for name in wanted:
        assert distance(exported[name], wanted[name]) <= 8 * ROUNDING * float(wanted[name].norm()), name


def _without(tensors, config):
    del tensors[next(key for key in tensors if "hada_w2_b" in key)]


def _misshapen(tensors, config):
    key = next(key for key in tensors if "hada_w1_a" in key)
    tensors[key] = tensors[key][:-1].contiguous()


def _unknown_tensor(tensors, config):
    key = next(key for key in tensors if "hada_w1_a" in key)
    tensors[key.replace("hada_w1_a", "hada_w9")] = tensors[key].clone()


def _not_finite(tensors, config):
    tensors[next(key for key in tensors if "hada_w1_a" in key)][0, 0] = float("nan")


def _unknown_field(tensors, config):
    config["use_new_thing"] = True


def _huge(tensors, config):
    config["r"] = 10**12


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_without, "hada_w2_b is missing: the adapter is incomplete"),
        (_misshapen, r"hada_w1_a is \[15, 3\], expected \[16, 3\]"),
        (_unknown_tensor, "hada_w9 is not a tensor of PEFT's LoHa layers"),
        (_not_finite, "hada_w1_a holds NaN or infinity"),
        (_unknown_field, "use_new_thing=true is a field of LoHa that the installed PEFT does not know"),
        (_huge, "r=1,000,000,000,000 is larger than any tensor"),
    ],
)
def test_broken_files_are_refused_in_one_sentence(spoil, sentence, made, tmp_path):
    base, adapter, _ = made(the("LOHA"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    spoil(tensors, config)
    broken = tmp_path / "broken"
    broken.mkdir()
    save_file(tensors, broken / "adapter_model.safetensors")
    (broken / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=sentence) as raised:
        mapconv.merge(broken, tmp_path / "merged", base=base)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "merged").exists()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm())
