"""Weights written by the libraries that own the storages, with the values that these libraries read back.

``python -m tests.checkpoint.codecs.oracles`` writes them into ``stored/``, where the tests find them without the
libraries. A case is (settings under their key, tensors by full name, values by the weight's name).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Case = tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]
STORED = Path(__file__).parent / "stored"
_NAME = "layers.0.proj"
_BITSANDBYTES = {"quantization_config": {"quant_method": "bitsandbytes"}}


def weight_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def bitsandbytes_4bit(kind: str, double: bool) -> Case:
    import bitsandbytes.functional as library

    codes, state = library.quantize_4bit(weight_of(11, 52), quant_type=kind, compress_statistics=double, blocksize=64)
    parts = {f"{_NAME}.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    state.dtype = torch.float32
    values = library.dequantize_4bit(codes, state)
    return _BITSANDBYTES, {f"{_NAME}.weight": codes} | parts, {f"{_NAME}.weight": values}


def bitsandbytes_int8() -> Case:
    import bitsandbytes.functional as library

    codes, scales, _ = library.int8_vectorwise_quant(weight_of(12, 40).half())
    values = torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, scales)
    return _BITSANDBYTES, {f"{_NAME}.weight": codes, f"{_NAME}.SCB": scales}, {f"{_NAME}.weight": values}


def compressed(form: str, **weights: Any) -> Case:
    """The library computes in its scales' dtype: they are widened before it reads the codes back."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    compressor = BaseCompressor.get_value_from_registry(form)
    weight = weight_of(12, 64)
    if args.strategy == "block":
        height, width = args.block_structure
        blocks = weight.view(12 // height, height, 64 // width, width)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        group = {"tensor": weight.numel(), "channel": 64}.get(args.strategy, args.group_size)
        parts = weight.reshape(-1 if args.strategy == "tensor" else 12, weight.numel() // group // 12 or 1, group)
        low, high = parts.amin(-1), parts.amax(-1)
    overall = generate_gparam(weight.min(), weight.max()) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(low, high, args, global_scale=overall)
    state = {"weight": weight, "weight_scale": scale.reshape(-1) if args.strategy == "tensor" else scale}
    if not args.symmetric:
        state["weight_zero_point"] = zero
    if overall is not None:
        state["weight_global_scale"] = overall.reshape(1)
    stored = compressor.compress(dict(state), scheme)
    wide = {
        name: tensor.float() if name.endswith("scale") and tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        for name, tensor in stored.items()
    }
    values = compressor.decompress(wide, scheme)["weight"]
    groups = {"group_0": {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}}
    settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    tensors = {f"{_NAME}.{name}": tensor.data for name, tensor in stored.items()}
    return {"quantization_config": settings}, tensors, {f"{_NAME}.weight": values.data}


def fp8_blocks() -> Case:
    """With blocks that both edges cut short."""
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    weight, block = weight_of(20, 40), (16, 16)
    scales = torch.zeros(2, 3)
    codes = torch.zeros(20, 40).to(torch.float8_e4m3fn)
    for i in range(2):
        for j in range(3):
            part = slice(16 * i, 16 * i + 16), slice(16 * j, 16 * j + 16)
            scales[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    tensors = {f"{_NAME}.weight": codes, f"{_NAME}.weight_scale_inv": scales}
    converter = FP8BlockDequantizer(targets=[f"re:{_NAME}"], weight_block_size=block, dtype=torch.float32)
    values = dict(tensors)
    values = converter.process(values) or values
    settings = {"quant_method": "fp8", "weight_block_size": list(block)}
    return {"quantization_config": settings}, tensors, {f"{_NAME}.weight": values[f"{_NAME}.weight"]}


def gpt_oss() -> Case:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(4)
    blocks = torch.randint(0, 256, (3, 12, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 140, (3, 12, 2), dtype=torch.uint8, generator=generator)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    values = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return {"quantization_config": {"quant_method": "mxfp4"}}, tensors, {name: values}


def mlx(mode: str, bits: int, group: int) -> Case:
    import mlx.core as library
    import numpy as np

    weight = library.array(weight_of(12, 64).numpy())
    parts = library.quantize(weight, group_size=group, bits=bits, mode=mode)
    values = library.dequantize(*parts, group_size=group, bits=bits, mode=mode, dtype=library.float32)
    names = ("weight", "scales", "biases")
    tensors = {f"{_NAME}.{name}": torch.from_numpy(np.array(part)) for name, part in zip(names, parts, strict=False)}
    settings = {"group_size": group, "bits": bits, "mode": mode}
    return {"quantization": settings}, tensors, {f"{_NAME}.weight": torch.from_numpy(np.array(values))}


#: By name: what it needs, how it is made, and the dtype in which the library multiplies.
CASES: dict[str, tuple[str, Callable[[], Case], torch.dtype]] = {
    **{
        f"bitsandbytes-{kind}{'-double' * double}": (
            "bitsandbytes", lambda kind=kind, double=double: bitsandbytes_4bit(kind, double), torch.float32,
        )
        for kind in ("nf4", "fp4")
        for double in (False, True)
    },
    "bitsandbytes-int8": ("bitsandbytes", bitsandbytes_int8, torch.float32),
    "compressed-fp8-tensor": (
        "compressed_tensors",
        lambda: compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
        torch.float32,
    ),
    "compressed-fp8-channel": (
        "compressed_tensors",
        lambda: compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        torch.float32,
    ),
    "compressed-fp8-block": (
        "compressed_tensors",
        lambda: compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[4, 16]),
        torch.float32,
    ),
    "compressed-int8-channel": (
        "compressed_tensors",
        lambda: compressed("int-quantized", num_bits=8, strategy="channel"),
        torch.float32,
    ),
    **{
        f"compressed-int{bits}-{'symmetric' if symmetric else 'asymmetric'}": (
            "compressed_tensors",
            lambda bits=bits, symmetric=symmetric: compressed(
                "pack-quantized", num_bits=bits, strategy="group", group_size=32, symmetric=symmetric
            ),
            torch.float32,
        )
        for bits in (3, 4, 8)
        for symmetric in (True, False)
    },
    "compressed-nvfp4": (
        "compressed_tensors",
        lambda: compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        torch.bfloat16,
    ),
    "fp8-blocks": ("compressed_tensors", fp8_blocks, torch.float32),
    "gpt-oss-mxfp4": ("transformers", gpt_oss, torch.float32),
    **{
        f"mlx-affine-{bits}": ("mlx", lambda bits=bits: mlx("affine", bits, 32), torch.float32)
        for bits in (2, 3, 4, 5, 6, 8)
    },
    "mlx-mxfp4": ("mlx", lambda: mlx("mxfp4", 4, 32), torch.float32),
    "mlx-mxfp8": ("mlx", lambda: mlx("mxfp8", 8, 32), torch.float32),
    "mlx-nvfp4": ("mlx", lambda: mlx("nvfp4", 4, 16), torch.float32),
}  # fmt: skip


def _write() -> Iterator[str]:
    STORED.mkdir(exist_ok=True)
    for name, (library, make, _) in CASES.items():
        importlib.import_module(library)
        config, tensors, values = make()
        table = {f"stored/{key}": tensor.contiguous() for key, tensor in tensors.items()}
        table |= {f"value/{key}": tensor.contiguous() for key, tensor in values.items()}
        save_file(table, STORED / f"{name}.safetensors", metadata={"config": json.dumps(config)})
        yield name


if __name__ == "__main__":
    print(*_write(), sep="\n")
