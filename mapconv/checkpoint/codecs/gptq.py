"""GPTQ: integers of 2, 3, 4 or 8 bits packed along the inputs, with scales and zero points for groups of them.

``w[out, in] = scale[g, out] · (code − zero)`` with g the group of the input. Version 1 of the format stores the zero
points less one, ``gptq_v2`` as they are. With act-order the groups of the inputs are shuffled, not the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.base import EncodedTensor, QuantizedModel, fault
from mapconv.checkpoint.codecs.packed import Packed
from mapconv.errors import UnsupportedError

#: How much is added to a stored zero point, by ``checkpoint_format``.
_ZERO_OFFSETS = {"gptq": 1, "": 1, "gptq_v2": 0}


class Gptq:
    """Recognises each module by ``qweight``."""

    methods = ("gptq",)
    signature = ()
    companions = (".qweight", ".qzeros", ".scales", ".g_idx")

    def describing(self, tensors: Mapping[str, TensorRef]) -> list[TensorRef]:
        return []

    def weights(self, model: QuantizedModel) -> Iterator[EncodedTensor]:
        layout = str(model.settings.get("checkpoint_format") or "")
        if layout not in _ZERO_OFFSETS:
            raise UnsupportedError(
                f"{model.folder} is quantized (gptq, checkpoint_format {layout}), a format that mapconv cannot read: "
                "give the 16-bit or 32-bit model with --base."
            )
        for path, codes in model.ending(".qweight"):
            yield self._weight(model, path, codes, _ZERO_OFFSETS[layout])

    def _weight(self, model: QuantizedModel, path: str, codes: TensorRef, offset: int) -> EncodedTensor:
        scale = model.take(f"{path}.scales", owner=codes)
        zero = model.take(f"{path}.qzeros", owner=codes)
        index = model.find(f"{path}.g_idx")
        if codes.dtype != "I32" or len(codes.shape) != 2:
            raise fault(codes, f"is {codes.dtype} {list(codes.shape)}, expected I32 [words, outputs]")
        words, height = codes.shape
        groups = scale.shape[0] if len(scale.shape) == 2 else 0
        if scale.shape != (groups, height) or not groups or scale.dtype not in ("F32", "F16", "BF16"):
            raise fault(scale, f"is {scale.dtype} {list(scale.shape)}, expected groups of {height} floats")
        bits = self._bits(model, codes, zero, groups)
        width = words * 32 // bits
        if index is not None and (index.shape != (width,) or index.dtype != "I32"):
            raise fault(index, f"is {index.dtype} {list(index.shape)}, expected I32 {[width]}")
        group = model.settings.get("group_size")
        group = group if type(group) is int and group > 0 else -(-width // groups)
        if index is None and -(-width // group) != groups:
            raise fault(scale, f"is {list(scale.shape)}, expected {-(-width // group)} groups of {group} inputs")
        encoding = Packed(
            f"GPTQ int{bits}",
            codes,
            scale,
            bits,
            height,
            width,
            group,
            order="columns",
            zero=zero,
            zero_offset=offset,
            group_index=index,
        )
        return model.encoded(f"{path}.weight", (height, width), encoding)

    def _bits(self, model: QuantizedModel, codes: TensorRef, zero: TensorRef, groups: int) -> int:
        """Of this module, which a ``dynamic`` configuration may give others than the rest: by its zero points."""
        height = codes.shape[1]
        for bits in (2, 3, 4, 8):
            if zero.dtype == "I32" and zero.shape == (groups, -(-height * bits // 32)) and codes.shape[0] % bits == 0:
                return bits
        raise fault(
            zero,
            f"is {zero.dtype} {list(zero.shape)}, expected I32 for {groups} groups of {height} codes of 2, 3, 4 or "
            f"8 bits ({model.settings.get('bits')} in config.json)",
        )
