"""NVIDIA ModelOpt: FP8 with a scale for the weight or for each row, and NVFP4 with two levels of scales.

NVFP4: ``w = value · weight_scale · weight_scale_2``, a product where compressed-tensors divides. ``pre_quant_scale``,
which AWQ variants keep for the layer's inputs, multiplies the columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.base import EncodedTensor, QuantizedModel, fault
from mapconv.checkpoint.codecs.scaled import scaled_bytes
from mapconv.checkpoint.codecs.small_floats import SmallFloats
from mapconv.errors import UnsupportedError

_FLOATS = ("F32", "F16", "BF16")
_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "NVFP4_AWQ", "MIXED_PRECISION", "NONE")


class ModelOpt:
    """Recognises each module by ``weight_scale``."""

    methods = ("modelopt", "modelopt_fp4")
    signature = (".weight_scale_2",)
    companions = (".weight_scale", ".weight_scale_2", ".pre_quant_scale")

    def describing(self, tensors: Mapping[str, TensorRef]) -> list[TensorRef]:
        return []

    def weights(self, model: QuantizedModel) -> Iterator[EncodedTensor]:
        algorithm = model.settings.get("quant_algo")
        if algorithm is not None and str(algorithm).upper() not in _ALGORITHMS:
            raise UnsupportedError(
                f"{model.folder} is quantized (modelopt {algorithm}), a format that mapconv cannot read: give the "
                "16-bit or 32-bit model with --base."
            )
        for path, scale in model.ending(".weight_scale"):
            codes = model.take(f"{path}.weight", owner=scale)
            columns = model.find(f"{path}.pre_quant_scale")
            width = codes.shape[-1] * (2 if codes.dtype == "U8" else 1)
            if columns is not None and (columns.numel != width or columns.dtype not in _FLOATS):
                raise fault(columns, f"is {columns.dtype} {list(columns.shape)}, expected {width} floats")
            if codes.dtype != "U8":
                encoding = scaled_bytes("ModelOpt FP8", codes, scale, columns=columns)
                yield model.encoded(codes.name, codes.shape, encoding)
                continue
            overall = model.take(f"{path}.weight_scale_2", owner=codes)
            if len(codes.shape) != 2 or scale.shape != (codes.shape[0], -(-width // 16)) or scale.dtype != "F8_E4M3":
                raise fault(
                    scale, f"is {scale.dtype} {list(scale.shape)}, expected F8_E4M3 {[codes.shape[0], -(-width // 16)]}"
                )
            if overall.numel != 1 or overall.dtype not in _FLOATS:
                raise fault(overall, f"is {overall.dtype} {list(overall.shape)}, expected one float")
            encoding = SmallFloats("ModelOpt NVFP4", codes, scale, width, 16, overall=overall, columns=columns)
            yield model.encoded(codes.name, (codes.shape[0], width), encoding)
