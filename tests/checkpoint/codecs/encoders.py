"""Every storage written by hand, in plain arithmetic on whole matrices, with the float32 values that codes stand for.

An encoder takes a float32 weight and gives (tensors by the ending of their names, values); what the library of a
storage writes itself is in ``stored/``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
_NF4 = torch.tensor([
    -1.0, -0.6961928, -0.5250731, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
    0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """A storage as a model's configuration names it, and how it stores one linear weight."""

    settings: dict[str, Any]
    encode: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
    key: str = "quantization_config"
    config: dict[str, Any] = field(default_factory=dict)


def pack(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Rows of codes as little-endian bit streams in 32-bit words."""
    stream = ((codes[..., None].astype(np.int64) >> np.arange(bits)) & 1).astype(np.uint8)
    stream = stream.reshape(len(codes), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view(np.int32).copy())


def nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return (values[..., None] - table).abs().argmin(-1)


def by_groups(weight: torch.Tensor, group: int) -> torch.Tensor:
    return weight.view(weight.shape[0], -1, group)


def nf4(weight: torch.Tensor, *, double: bool = False, block: int = 64, storage: torch.dtype = torch.uint8):
    flat = weight.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = padded.abs().amax(1)
    state: dict[str, Any] = {
        "shape": list(weight.shape), "dtype": "bfloat16", "blocksize": block, "quant_type": "nf4",
    }  # fmt: skip
    tensors: Tensors = {}
    if double:
        offset, book = float(absmax.mean()), torch.linspace(-1, 1, 256)
        nested = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        scales = nested.abs().amax(1)
        codes = nearest(nested / scales[:, None], book)
        absmax = (book[codes] * scales[:, None]).view(-1)[: len(absmax)] + offset
        tensors |= {"weight.nested_absmax": scales, "weight.nested_quant_map": book}
        tensors |= {"weight.absmax": codes.view(-1)[: len(absmax)].to(torch.uint8)}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        tensors["weight.absmax"] = absmax
    codes = nearest(padded / absmax[:, None], _NF4)
    values = (_NF4[codes] * absmax[:, None]).view(-1)[: flat.numel()].view(weight.shape)
    codes = codes.view(-1)[: flat.numel() + flat.numel() % 2].view(-1, 2)
    tensors["weight"] = (codes[:, 0] << 4 | codes[:, 1]).to(torch.uint8).view(storage).view(-1, 1)
    tensors["weight.quant_map"] = _NF4
    text = json.dumps(state).encode()
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors, values


def llm_int8(weight: torch.Tensor):
    absmax = weight.abs().amax(1)
    codes = (weight * 127 / absmax[:, None]).round().to(torch.int8)
    values = codes.float() * absmax[:, None] * 7.874015718698502e-3
    return {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}, values


def block_fp8(weight: torch.Tensor, *, block: tuple[int, int] = (16, 16), exponents: bool = False):
    height, width = weight.shape
    scales = torch.zeros(-(-height // block[0]), -(-width // block[1]))
    codes, values = torch.zeros_like(weight).to(torch.float8_e4m3fn), torch.zeros_like(weight)
    stored = torch.zeros(scales.shape, dtype=torch.uint8)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale = weight[part].abs().max() / 448
            if exponents:
                power = int(torch.log2(scale).ceil())
                stored[i, j], scale = power + 127, torch.tensor(2.0**power)
            scales[i, j] = scale
            codes[part] = (weight[part] / scale).to(torch.float8_e4m3fn)
            values[part] = codes[part].float() * scale
    return {"weight": codes, "weight_scale_inv": stored if exponents else scales}, values


def _renamed(encoded: tuple[Tensors, torch.Tensor], scale: str) -> tuple[Tensors, torch.Tensor]:
    tensors, values = encoded
    return {"weight": tensors["weight"], scale: tensors["weight_scale_inv"]}, values


def deepseek_fp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    tensors, values = small_floats(weight, names=("weight", "scale"), group=32, overall=None)
    return tensors | {"weight": tensors["weight"].view(torch.int8)}, values


def fp8(weight: torch.Tensor, *, scale: str = "tensor", name: str = "weight_scale"):
    scales = (weight.abs().amax(1, keepdim=True) if scale == "channel" else weight.abs().max()[None]) / 448
    codes = (weight / scales).to(torch.float8_e4m3fn)
    return {"weight": codes, name: scales}, codes.float() * scales


def int8(weight: torch.Tensor, *, group: int | None = None, asymmetric: bool = False):
    parts = by_groups(weight, group or weight.shape[1])
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    scales = (high - low) / 255 if asymmetric else parts.abs().amax(-1, keepdim=True) / 127
    zeros = (-128 - low / scales).round() if asymmetric else torch.zeros_like(scales)
    codes = (parts / scales + zeros).round().clamp(-128, 127)
    values = ((codes - zeros) * scales).view(weight.shape)
    tensors = {"weight": codes.to(torch.int8).view(weight.shape), "weight_scale": scales[..., 0]}
    return tensors | ({"weight_zero_point": zeros[..., 0].to(torch.int8)} if asymmetric else {}), values


def integers(weight: torch.Tensor, bits: int, group: int, order: torch.Tensor | None = None):
    """(codes, zeros, scales, values): unsigned codes of (out, in), zeros and scales of (out, groups)."""
    index = torch.arange(weight.shape[1]) // group if order is None else order
    count = int(index.max()) + 1
    low = torch.stack([weight[:, index == g].amin(1) for g in range(count)], 1)
    high = torch.stack([weight[:, index == g].amax(1) for g in range(count)], 1)
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = (-low / scales).round().clamp(1, 2**bits - 1)
    codes = (weight / scales[:, index] + zeros[:, index]).round().clamp(0, 2**bits - 1)
    return codes, zeros, scales, (codes - zeros[:, index]) * scales[:, index]


def pack_quantized(weight: torch.Tensor, *, bits: int = 4, group: int = 16, symmetric: bool = False, order=None):
    codes, zeros, scales, values = integers(weight, bits, group, order)
    index = torch.arange(weight.shape[1]) // group if order is None else order
    tensors = {
        "weight_packed": pack(codes.numpy(), bits), "weight_scale": scales.half(),
        "weight_shape": torch.tensor(weight.shape),
    }  # fmt: skip
    if symmetric:
        values = (codes - 2 ** (bits - 1)) * scales[:, index]
    else:
        tensors["weight_zero_point"] = pack(zeros.T.numpy(), bits).T.contiguous()
    return tensors | ({} if order is None else {"weight_g_idx": order.int()}), values


def small_floats(weight: torch.Tensor, *, names: tuple[str, ...], group: int, overall: str | None):
    parts = by_groups(weight, group)
    largest = parts.abs().amax(-1, keepdim=True) / 6
    tensors: Tensors = {}
    if overall is None:
        powers = torch.log2(largest).ceil()
        stored, scales = (powers + 127).to(torch.uint8), 2.0**powers
    else:
        one = largest.max() / 448
        stored = (largest / one).to(torch.float8_e4m3fn)
        number = (1 / one if overall == "divisor" else one)[None]
        scales = stored.float() / number if overall == "divisor" else stored.float() * number
        tensors[names[2]] = number
    codes = nearest(parts / scales, _E2M1).view(weight.shape)
    values = (by_groups(_E2M1[codes], group) * scales).view(weight.shape)
    tensors[names[0]] = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    tensors[names[1]] = stored[..., 0]
    return tensors, values


def gptq(weight: torch.Tensor, *, bits: int = 4, group: int = 16, version: int = 1, order: torch.Tensor | None = None):
    codes, zeros, scales, values = integers(weight, bits, group, order)
    tensors = {
        "qweight": pack(codes.numpy(), bits).T.contiguous(),
        "qzeros": pack((zeros - int(version == 1)).T.numpy(), bits),
        "scales": scales.half().T.contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // group if order is None else order).int(),
    }
    return tensors, values


def awq(weight: torch.Tensor, *, group: int = 16):
    codes, zeros, scales, values = integers(weight, 4, group)

    def words(matrix: torch.Tensor) -> torch.Tensor:
        numbers = matrix.T.reshape(matrix.shape[1], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].long()
        return (numbers << torch.arange(0, 32, 4)).sum(-1).to(torch.int64).view(torch.int32)[..., ::2].contiguous()

    return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales.half().T.contiguous()}, values


def mlx(weight: torch.Tensor, *, bits: int = 4, group: int = 16):
    parts = by_groups(weight, group)
    bias = parts.amin(-1, keepdim=True)
    scales = (parts.amax(-1, keepdim=True) - bias) / (2**bits - 1)
    codes = ((parts - bias) / scales).round()
    values = (codes * scales + bias).view(weight.shape)
    words = pack(codes.view(weight.shape).numpy(), bits).view(torch.uint32)
    return {"weight": words, "scales": scales[..., 0], "biases": bias[..., 0]}, values


def shuffled(width: int, group: int) -> torch.Tensor:
    """Act-order: the group of each column, in no order."""
    order = torch.randperm(width, generator=torch.Generator().manual_seed(3))
    return (torch.arange(width) // group)[order]


def _scheme(format_name: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": format_name, "config_groups": groups}


_CT_NVFP4 = ("weight_packed", "weight_scale", "weight_global_scale")
_MODELOPT_NVFP4 = ("weight", "weight_scale", "weight_scale_2")
STORAGES: dict[str, Storage] = {
    "nf4": Storage({"quant_method": "bitsandbytes", "load_in_4bit": True}, nf4),
    "nf4-double": Storage({"quant_method": "bitsandbytes"}, lambda w: nf4(w, double=True)),
    "nf4-in-bfloat16": Storage({"quant_method": "bitsandbytes"}, lambda w: nf4(w, storage=torch.bfloat16)),
    "int8": Storage({"quant_method": "bitsandbytes", "load_in_8bit": True}, llm_int8),
    "fp8-blocks": Storage({"quant_method": "fp8", "weight_block_size": [16, 16]}, block_fp8),
    "fp8-ragged": Storage(
        {"quant_method": "fp8", "weight_block_size": [20, 12]}, lambda w: block_fp8(w, block=(20, 12))
    ),
    "fp8-exponents": Storage(
        {"quant_method": "fp8", "weight_block_size": [16, 16], "scale_fmt": "ue8m0"},
        lambda w: block_fp8(w, exponents=True),
    ),
    "fp8-scalar": Storage(
        {"quant_method": "fp8", "weight_block_size": None}, lambda w: fp8(w, name="weight_scale_inv")
    ),
    "fp8-short-names": Storage(
        {"quant_method": "fp8", "weight_block_size": [16, 16]}, lambda w: _renamed(block_fp8(w), "scale")
    ),
    "fp8-fp4": Storage({"quant_method": "fp8", "weight_block_size": [16, 16]}, lambda w: deepseek_fp4(w)),
    "ct-fp8-tensor": Storage(_scheme("float-quantized", num_bits=8, type="float"), fp8),
    "ct-fp8-channel": Storage(_scheme("float-quantized", num_bits=8), lambda w: fp8(w, scale="channel")),
    "ct-int8": Storage(_scheme("int-quantized", num_bits=8, type="int"), int8),
    "ct-int8-group": Storage(
        _scheme("naive-quantized", num_bits=8, group_size=16), lambda w: int8(w, group=16, asymmetric=True)
    ),
    "ct-int4": Storage(
        _scheme("pack-quantized", num_bits=4, group_size=16), lambda w: pack_quantized(w, symmetric=True)
    ),
    "ct-int4-asymmetric": Storage(_scheme("pack-quantized", num_bits=4, group_size=16), pack_quantized),
    "ct-int3": Storage(_scheme("pack-quantized", num_bits=3, group_size=16), lambda w: pack_quantized(w, bits=3)),
    "ct-int8-packed": Storage(
        _scheme("pack-quantized", num_bits=8, group_size=16), lambda w: pack_quantized(w, bits=8)
    ),
    "ct-int4-order": Storage(
        _scheme("pack-quantized", num_bits=4, group_size=16, actorder="group"),
        lambda w: pack_quantized(w, order=shuffled(w.shape[1], 16)),
    ),
    "ct-nvfp4": Storage(
        _scheme("nvfp4-pack-quantized", num_bits=4),
        lambda w: small_floats(w, names=_CT_NVFP4, group=16, overall="divisor"),
    ),
    "ct-mxfp4": Storage(
        _scheme("mxfp4-pack-quantized", num_bits=4),
        lambda w: small_floats(w, names=_CT_NVFP4, group=32, overall=None),
    ),
    "modelopt-fp8": Storage({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8),
    "modelopt-nvfp4": Storage(
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        lambda w: small_floats(w, names=_MODELOPT_NVFP4, group=16, overall="factor"),
    ),
    "fbgemm-fp8": Storage({"quant_method": "fbgemm_fp8"}, lambda w: fp8(w, scale="channel")),
    **{
        f"gptq-{bits}": Storage(
            {"quant_method": "gptq", "bits": bits, "group_size": 16}, lambda w, bits=bits: gptq(w, bits=bits)
        )
        for bits in (2, 3, 4, 8)
    },
    "gptq-v2": Storage(
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq_v2"},
        lambda w: gptq(w, version=2),
    ),
    "gptq-order": Storage(
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
        lambda w: gptq(w, order=shuffled(w.shape[1], 16)),
    ),
    "awq": Storage({"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 16}, awq),
    **{
        f"mlx-{bits}": Storage(
            {"bits": bits, "group_size": 16}, lambda w, bits=bits: mlx(w, bits=bits), key="quantization"
        )
        for bits in (2, 3, 4, 6, 8)
    },
}
