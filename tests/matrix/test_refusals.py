"""What mapconv refuses, it refuses by name and with the reason, before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import mapconv

from .bases import load_base
from .dialects import CONFIG, WEIGHTS, pickled
from .models import MODELS
from .options import OPTIONS
from .oracle import Workshop, randomise

BY_NAME = {option.name: option for option in OPTIONS}
LLAMA = MODELS["llama"]

#: Options of LoraConfig: (arguments, the name that the sentence must hold, words of which one tells the reason).
#: They are written by PEFT's own class, so that the file looks as it does in the wild.
REFUSED = {
    "pissa_niter": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4", "random|reproduc"),
    "corda": ({"init_lora_weights": "corda"}, "corda", "data|covariance|calibration"),
    "lora_ga": ({"init_lora_weights": "lora_ga", "lora_ga_config": {}}, "lora_ga", "gradient|data"),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "loftq", "quantiz"),
    "alora": ({"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}, "alora", "token"),
    "arrow": ({"arrow_config": {"top_k": 1}}, "arrow", "rout"),
    "qalora": ({"use_qalora": True}, "qalora", "quantiz|pool"),
    "kasa": ({"kasa_config": {}}, "kasa", "truncat|singular"),
    "bdlora": ({"use_bdlora": {"target_modules_bd_a": ["q_proj"]}}, "bdlora|block-diagonal", "block"),
    "monteclora": ({"monteclora_config": {}}, "monteclora", "sampl|random"),
    "velora": ({"velora_config": {}}, "velora", "compress|activation|training|backward"),
}


def assert_refused(adapter: Path, base: Path, tmp_path: Path, *patterns: str, **options) -> None:
    """Both commands raise a MapconvError of one sentence that matches every pattern, and leave nothing behind."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for command in (mapconv.merge, mapconv.upgrade):
        with pytest.raises(mapconv.MapconvError) as caught:
            command(adapter, tmp_path / "out", base=base, **options)
        for pattern in patterns:
            assert re.search(pattern, str(caught.value), re.IGNORECASE), (pattern, str(caught.value))
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def copied(workshop: Workshop, option: str, tmp_path: Path, name: str = "llama") -> tuple[Path, Path]:
    """A private copy of a case's adapter, and its base."""
    case = workshop.case(MODELS[name], BY_NAME[option])
    return shutil.copytree(case.adapter, tmp_path / "adapter"), case.base


@pytest.mark.parametrize("option", REFUSED)
def test_lora_options_without_a_fixed_merge(option, workshop: Workshop, tmp_path):
    arguments, name, reason = REFUSED[option]
    adapter, base = copied(workshop, "lora", tmp_path)
    if option == "loftq":  # PEFT's class wants scipy before it accepts the option: write what it would write
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"]).to_dict() | arguments
        config["target_modules"] = sorted(config["target_modules"])
        (adapter / CONFIG).write_text(json.dumps(config))
    else:
        targets = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        LoraConfig(**targets, **arguments).save_pretrained(adapter)
    assert_refused(adapter, base, tmp_path, name, reason)


def test_x_lora_is_named(workshop: Workshop, tmp_path):
    adapter, base = copied(workshop, "lora", tmp_path)
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"peft_type": "XLORA", "adapters": {"0": "somewhere"}}))
    assert_refused(adapter, base, tmp_path, "XLORA|X-LoRA", "LoRA")


@pytest.mark.parametrize(
    ("model", "arguments", "name", "reason"),
    [
        ("wav2vec2", {"target_modules": ["pos_conv_embed.conv"]}, "group", "merge"),
        (
            "llama",
            {"target_modules": ["q_proj"], "lora_bias": True},
            "lora_bias",
            "no bias|not got|has none|without a bias",
        ),
    ],
    ids=["grouped-convolution", "lora-bias-without-bias"],
)
def test_what_peft_itself_refuses_to_merge(model, arguments, name, reason, workshop: Workshop, tmp_path):
    base = workshop.bases.folder(model, "default")
    peft_model = get_peft_model(load_base(MODELS[model], base), LoraConfig(r=4, **arguments))
    randomise(peft_model, seed=1)
    peft_model.save_pretrained(tmp_path / "adapter")
    with pytest.raises((NotImplementedError, RuntimeError)):
        peft_model.merge_and_unload()
    assert_refused(tmp_path / "adapter", base, tmp_path, name, reason)


def test_pickles_need_a_flag(workshop: Workshop, tmp_path):
    adapter, base = copied(workshop, "lora", tmp_path)
    pickled(LLAMA, adapter, base)
    assert_refused(adapter, base, tmp_path, r"adapter_model\.bin", "pickle", "allow.pickle")


def test_a_pickle_that_runs_code_is_refused_even_with_the_flag(workshop: Workshop, tmp_path):
    adapter, base = copied(workshop, "lora", tmp_path)
    (adapter / WEIGHTS).unlink()
    torch.save({"x": _Bomb(tmp_path / "exploded")}, adapter / "adapter_model.bin")
    assert_refused(adapter, base, tmp_path, r"adapter_model\.bin", allow_pickle=True)
    assert not (tmp_path / "exploded").exists()


class _Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


#: How each quantized base announces itself: (quantization_config, suffixes and dtypes of its tensors, names).
QUANTIZED = {
    "bitsandbytes-4bit": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"weight": torch.uint8, "weight.absmax": torch.uint8, "weight.quant_map": torch.float32},
        "bitsandbytes|4.?bit",
    ),
    "bitsandbytes-8bit": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"weight": torch.int8, "SCB": torch.float32},
        "SCB",
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4},
        {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32},
        "gptq",
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4},
        {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
        "awq",
    ),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32},
        "fp8|float8|F8_E4M3",
    ),
    "mxfp4": (
        {"quant_method": "mxfp4"},
        {"weight_blocks": torch.uint8, "weight_scales": torch.uint8},
        "mxfp4",
    ),
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_bases(method, workshop: Workshop, tmp_path):
    settings, tensors, name = QUANTIZED[method]
    adapter, plain = copied(workshop, "lora", tmp_path)
    base = shutil.copytree(plain, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    for key in [key for key in weights if "_proj.weight" in key]:
        weights.pop(key)
        stem = key.removesuffix("weight")
        weights |= {stem + suffix: torch.ones(8, 4).to(dtype) for suffix, dtype in tensors.items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    assert_refused(adapter, base, tmp_path, name, "quantiz|expected")
