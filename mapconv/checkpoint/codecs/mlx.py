"""MLX (mlx-lm): packed integers with a scale and a bias for each group, or MX and NV floats; embeddings too.

``w = code · scale + bias``. The modes ``mxfp4``, ``mxfp8`` and ``nvfp4`` have scales alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.base import EncodedTensor, Encoding, QuantizedModel, fault
from mapconv.checkpoint.codecs.packed import Packed
from mapconv.checkpoint.codecs.scaled import ScaledBytes
from mapconv.checkpoint.codecs.small_floats import SmallFloats
from mapconv.errors import UnsupportedError

_MODES = {
    "mxfp4": ("MXFP4", 4, 32, "F8_E8M0"),
    "nvfp4": ("NVFP4", 4, 16, "F8_E4M3"),
    "mxfp8": ("MXFP8", 8, 32, "F8_E8M0"),
}


class Mlx:
    """Recognises each module by a weight of U32 with ``scales``."""

    methods = ("mlx",)
    signature = ()
    companions = (".scales", ".biases")

    def describing(self, tensors: Mapping[str, TensorRef]) -> list[TensorRef]:
        return []

    def weights(self, model: QuantizedModel) -> Iterator[EncodedTensor]:
        for path, scale in model.ending(".scales"):
            codes = model.take(f"{path}.weight", owner=scale)
            if codes.dtype != "U32" or len(codes.shape) < 2 or scale.shape[:-1] != codes.shape[:-1]:
                raise fault(
                    codes, f"is {codes.dtype} {list(codes.shape)}, expected U32 with scales {list(scale.shape)}"
                )
            own = model.settings.get(path)
            settings = model.settings if not isinstance(own, Mapping) else {**model.settings, **own}
            mode = settings.get("mode", "affine")
            if mode == "affine":
                yield self._affine(model, path, codes, scale, settings)
            elif mode in _MODES:
                width, encoding = _float_mode(mode, codes, scale)
                yield model.encoded(codes.name, (*codes.shape[:-1], width), encoding)
            else:
                raise UnsupportedError(
                    f"{model.folder} is quantized (mlx, mode {mode}), a format that mapconv cannot read: give the "
                    "16-bit or 32-bit model with --base."
                )

    def _affine(
        self, model: QuantizedModel, path: str, codes: TensorRef, scale: TensorRef, settings: Mapping[str, Any]
    ) -> EncodedTensor:
        bias = model.take(f"{path}.biases", scale.shape, owner=codes)
        bits, group = settings.get("bits"), settings.get("group_size")
        if bits not in (2, 3, 4, 5, 6, 8) or type(group) is not int or group <= 0:
            raise UnsupportedError(
                f"{model.folder}/config.json says {bits!r} bits in groups of {group!r} for {path}: mapconv reads 2, 3, "
                "4, 5, 6 and 8 bits."
            )
        width = codes.shape[-1] * 32 // bits
        if width != group * scale.shape[-1]:
            raise fault(scale, f"is {list(scale.shape)}, expected {width // group} groups of {group} columns")
        for ref in (scale, bias):
            if ref.dtype not in ("F32", "F16", "BF16"):
                raise fault(ref, f"has dtype {ref.dtype}, expected a float")
        encoding = Packed(f"MLX int{bits}", codes, scale, bits, codes.shape[-2], width, group, bias=bias)
        return model.encoded(codes.name, (*codes.shape[:-1], width), encoding)


def _float_mode(mode: str, codes: TensorRef, scale: TensorRef) -> tuple[int, Encoding]:
    """(width, encoding) of codes that are floats of 4 or 8 bits."""
    name, bits, group, scale_dtype = _MODES[mode]
    width = codes.shape[-1] * 32 // bits
    if scale.dtype != "U8" or width != group * scale.shape[-1]:
        raise fault(
            scale, f"is {scale.dtype} {list(scale.shape)}, expected U8 for groups of {group} of {width} columns"
        )
    if bits == 4:
        return width, SmallFloats(f"MLX {name}", codes, scale, width, group, scale_dtype)
    rows = codes.numel // codes.shape[-1]
    return width, ScaledBytes(
        f"MLX {name}", codes, scale, rows, width, (1, group), scale_dtype=scale_dtype, codes_dtype="F8_E4M3"
    )
