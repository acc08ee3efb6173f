"""The files of MAP's authors, held to their formula in float64: merged, upgraded, loaded, verified, and refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.nn import load_adapter
from mapconv.runtime.models import attach_with_peft
from tests import examples
from tests.files import edit_tensors
from tests.models import load_adapted, load_base, log_probabilities
from tests.nn.test_running import close

KEY = "base_model.model.lin"
SETTINGS = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["lin"], "use_map": True}


def formula(W, A, B, s, alpha, beta, eps=1e-6):
    """Theirs, in float64 on dense matrices."""
    W, update = W.double(), s * (B.double() @ A.double())
    return alpha * W / W.norm().clamp_min(eps) + beta * update / update.norm().clamp_min(eps)


@pytest.fixture
def small(tmp_path):
    """A base of one weight, and a function that writes an adapter of it and returns what the formula makes."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(12, 10, generator=generator)
    (tmp_path / "base").mkdir()
    save_file({"lin.weight": W}, tmp_path / "base" / "model.safetensors")

    def write(folder="lomap", *, spelling="", alpha=3.0, beta=-0.7, size=1.0, pickled=False, **fields):
        A, B = (torch.randn(shape, generator=generator) for shape in ((3, 10), (12, 3)))
        B *= size
        tensors = {f"{KEY}.lora_A.weight": A, f"{KEY}.lora_B.weight": B}
        tensors[f"{KEY}.{spelling}map_alpha"] = torch.tensor(alpha)
        tensors[f"{KEY}.{spelling}map_beta"] = torch.tensor(beta)
        (tmp_path / folder).mkdir()
        config = {f"{spelling}use_map" if key == "use_map" else key: value for key, value in SETTINGS.items()}
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(config | fields))
        if pickled:
            torch.save(tensors, tmp_path / folder / "adapter_model.bin")
        else:
            save_file(tensors, tmp_path / folder / "adapter_model.safetensors")
        eps = fields.get("map_eps", 1e-6)
        scalars = (torch.tensor(value).double() for value in (alpha, beta))
        return formula(W, A, B, 2.0, *scalars, eps if isinstance(eps, float) else math.nan)

    return tmp_path, write


def merged(folder, adapter="lomap", **options):
    mapconv.merge(folder / adapter, folder / "merged", base=folder / "base", dtype="float32", force=True, **options)
    return load_file(folder / "merged" / "model.safetensors")["lin.weight"].double()


@pytest.mark.parametrize(
    ("written", "options"),
    [
        ({}, {}),
        ({"spelling": "lora_"}, {}),
        ({"pickled": True}, {"allow_pickle": True}),
        ({"alpha": -2.0, "beta": 0.5}, {}),
        ({"map_eps": 1e-3, "size": 1e-6, "beta": 1.0}, {}),  # both under and over the floor
        ({"size": 0.0}, {}),
        ({"map_norm_scope": "global", "map_beta_init": 1.0, "map_detach_denom": False}, {}),
    ],
)
def test_merge_and_upgrade_are_the_formula(small, written, options):
    folder, write = small
    wanted = write(**written)
    assert close(merged(folder, **options), wanted, atol=2e-6)
    result = mapconv.upgrade(folder / "lomap", folder / "map", base=folder / "base", **options)
    assert result.worst_error <= 1e-6
    assert close(merged(folder, "map"), wanted, atol=2e-6)


def test_a_lower_rank_or_a_plain_lora_is_the_closest_one(small):
    folder, write = small
    wanted = write(alpha=4.0)
    W = load_file(folder / "base" / "model.safetensors")["lin.weight"].double()
    for options in ({"rank": 1}, {"lora_compatible": True}):
        result = mapconv.upgrade(folder / "lomap", folder / "map", base=folder / "base", force=True, **options)
        error = float((wanted - merged(folder, "map")).norm() / (wanted - W).norm())
        assert result.worst_error == pytest.approx(error, rel=1e-4)
    singular = torch.linalg.svdvals(wanted - W)  # a = 1 and rank 3
    assert error == pytest.approx(float(singular[3:].norm() / singular.norm()), rel=1e-3)


@settings(max_examples=examples(40))
@given(
    alpha=st.floats(-1e3, 1e3, width=32).filter(lambda value: abs(value) > 0.1),
    beta=st.floats(-1e3, 1e3, width=32),
    size=st.sampled_from([1e-12, 1e-8, 1e-4, 1.0, 1e3]),
)
def test_any_scalars(tmp_path_factory, alpha, beta, size):
    folder = tmp_path_factory.mktemp("any")
    generator = torch.Generator().manual_seed(1)
    W, A, B = (torch.randn(shape, generator=generator) for shape in ((6, 5), (2, 5), (6, 2)))
    B *= size
    (folder / "base").mkdir()
    (folder / "lomap").mkdir()
    save_file({"lin.weight": W}, folder / "base" / "model.safetensors")
    tensors = {f"{KEY}.lora_A.weight": A, f"{KEY}.lora_B.weight": B}
    tensors |= {f"{KEY}.map_alpha": torch.tensor(alpha), f"{KEY}.map_beta": torch.tensor([beta])}
    save_file(tensors, folder / "lomap" / "adapter_model.safetensors")
    (folder / "lomap" / "adapter_config.json").write_text(json.dumps(SETTINGS | {"r": 2, "lora_alpha": 1}))
    wanted = formula(W, A, B, 0.5, alpha, beta)
    assert float((merged(folder) - wanted).norm()) <= 1e-6 * float(wanted.norm())
    mapconv.upgrade(folder / "lomap", folder / "map", base=folder / "base")
    assert float((merged(folder, "map") - wanted).norm()) <= 1e-6 * (float(wanted.norm()) + abs(alpha) + abs(beta))


@pytest.fixture
def model_sized(base, own_lora):
    """The session's LoRA as one of theirs, with α near ‖W0‖ and β near the update's length."""
    weights = load_file(base / "model.safetensors")

    def add(tensors):
        for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
            path = key.removesuffix(".lora_A.weight")
            norm = weights[f"{path.removeprefix('base_model.model.')}.weight"].norm()
            tensors |= {f"{path}.map_alpha": 0.97 * norm, f"{path}.map_beta": 0.3 * norm}

    edit_tensors(own_lora / "adapter_model.safetensors", add)
    config = json.loads((own_lora / "adapter_config.json").read_text())
    (own_lora / "adapter_config.json").write_text(json.dumps(config | {"use_map": True, "map_eps": 1e-6}))
    return own_lora


def test_it_runs_in_the_live_model_and_everywhere_alike(base, model_sized, tmp_path, run):
    told = run("inspect", model_sized, "--base", base)
    assert told.status == 0, told.err
    assert "LoMAP" in told.out
    mapconv.merge(model_sized, tmp_path / "merged")
    wanted = log_probabilities(load_base(tmp_path / "merged"))
    live = load_adapter(load_base(base), model_sized)
    assert close(log_probabilities(live), wanted)
    mapconv.save_adapter(live, tmp_path / "saved")
    mapconv.upgrade(model_sized, tmp_path / "map")
    for folder in (tmp_path / "saved", tmp_path / "map"):
        assert close(log_probabilities(load_adapted(base, folder)), wanted)
    report = mapconv.verify(tmp_path / "map", model_sized, samples=1)
    assert report.worst_module.error < 1e-6
    assert report.kl < 1e-9


REFUSED = {
    "scope": ({"map_norm_scope": "row"}, UnsupportedError, "map_norm_scope is .row..*only global is MAP"),
    "fan": ({"fan_in_fan_out": True}, UnsupportedError, "use_map together with fan_in_fan_out"),
    "enable": ({"enable_lora": [True]}, UnsupportedError, "use_map together with enable_lora"),
    "delora": ({"use_delora": True}, UnsupportedError, "use_map together with use_delora"),
    "dora": ({"use_dora": True}, UnsupportedError, "use_map together with use_dora"),
    "eps": ({"map_eps": "tiny"}, AdapterError, "map_eps is .tiny., expected a number"),
    "negative": ({"map_eps": -1.0}, AdapterError, "map_eps is -1.0"),
    "not said": ({"use_map": False}, AdapterError, "does not say use_map, but .*map_alpha"),
    "bias": ({"lora_bias": True}, UnsupportedError, "lora_bias=true is nothing that MAP's authors train"),
    "pissa": ({"init_lora_weights": "pissa"}, UnsupportedError, "init_lora_weights=.pissa. is nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(small, case):
    folder, write = small
    written, error, words = REFUSED[case]
    write(**written)
    with pytest.raises(error, match=words):
        mapconv.inspect(folder / "lomap")


BROKEN = {
    "none": (lambda t: [t.pop(k) for k in list(t) if "map_" in k], "has no map_alpha, but .* MAP"),
    "one": (lambda t: t.pop(f"{KEY}.map_beta"), "has no map_beta"),
    "vector": (lambda t: t.update({f"{KEY}.map_beta": torch.ones(12, 1)}), r"is \[12, 1\], expected one number"),
    "empty": (lambda t: t.update({f"{KEY}.map_beta": torch.ones(0)}), r"is \[0\], expected one number"),
    "NaN": (lambda t: t.update({f"{KEY}.map_alpha": torch.tensor(math.nan)}), "is nan, expected a number"),
    "stray": (lambda t: t.update({f"{KEY}2.map_alpha": torch.ones(())}), "belongs to a module that has no factors"),
    "twice": (lambda t: t.update({f"{KEY}.lora_map_alpha": torch.ones(())}), "are the same scalar"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(small, case):
    folder, write = small
    write()
    change, words = BROKEN[case]
    edit_tensors(folder / "lomap" / "adapter_model.safetensors", change)
    with pytest.raises(AdapterError, match=words):
        mapconv.inspect(folder / "lomap")


def test_stock_peft_is_not_let_run_it(base, model_sized):
    """It would pass the scalars by without a word."""
    with pytest.raises(UnsupportedError, match="upgrade it without data first"):
        attach_with_peft(load_base(base), model_sized, "default")


def test_calibration_starts_from_it(model_sized, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    mapconv.upgrade(model_sized, tmp_path / "map")
    result = mapconv.calibrate(
        tmp_path / "map", against=model_sized, data=tmp_path / "text.txt", steps=1, batch_size=1, sequence_length=32
    )
    assert result.models["closed form"].kl < 1e-9
