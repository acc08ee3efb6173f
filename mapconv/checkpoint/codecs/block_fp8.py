"""FP8 by blocks (DeepSeek's form, ``quant_method: fp8``): ``w = code · weight_scale_inv``, a product despite the name.

The size of a block is the configuration's alone: shapes do not tell it where the last block is short. Experts may be
4-bit floats instead, two in an int8, the first in the low nibble, with a power of two for each 32 columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.base import EncodedTensor, Encoding, QuantizedModel, fault
from mapconv.checkpoint.codecs.scaled import ScaledBytes, block_grid
from mapconv.checkpoint.codecs.small_floats import SmallFloats
from mapconv.errors import CheckpointError, UnsupportedError

#: (ending of the codes' name, ending of the scales'); experts may be stacked under names of their own.
_PAIRS = (
    (".weight", ".weight_scale_inv"),
    (".weight", ".scale"),  # DeepSeek's own files
    (".gate_up_proj", ".gate_up_proj_scale_inv"),
    (".down_proj", ".down_proj_scale_inv"),
)
_FOUR_BIT_GROUP = 32


class BlockFp8:
    """Recognises it by ``weight_scale_inv``."""

    methods = ("fp8",)
    signature = (".weight_scale_inv",)
    companions = tuple(scale for _, scale in _PAIRS)

    def describing(self, tensors: Mapping[str, TensorRef]) -> list[TensorRef]:
        return []

    def weights(self, model: QuantizedModel) -> Iterator[EncodedTensor]:
        block = self._block(model)
        for codes_name, scale_name in _PAIRS:
            for path, scale in model.ending(scale_name):
                codes = model.take(path + codes_name, owner=scale)
                encoding = self._encoding(codes, scale, block, model)
                packed = 2 if isinstance(encoding, SmallFloats) else 1
                yield model.encoded(codes.name, (*codes.shape[:-1], packed * codes.shape[-1]), encoding)

    def _block(self, model: QuantizedModel) -> tuple[int, int] | None:
        block = model.settings.get("weight_block_size")
        if block is None:
            return None
        if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
            raise CheckpointError(
                f"{model.folder}/config.json has weight_block_size {block!r}, expected [rows, columns]."
            )
        return block[0], block[1]

    def _encoding(
        self, codes: TensorRef, scale: TensorRef, block: tuple[int, int] | None, model: QuantizedModel
    ) -> Encoding:
        if codes.dtype == "I8" and len(codes.shape) == 2:
            return self._four_bits(codes, scale)
        if codes.dtype != "F8_E4M3" or len(codes.shape) < 2:
            raise UnsupportedError(
                f"{codes.file}: {codes.name} has dtype {codes.dtype} and shape {list(codes.shape)}, which mapconv does "
                "not read as block-wise FP8: give the 16-bit model with --base."
            )
        *stack, height, width = codes.shape
        if block is None:
            block = (height, width)  # one scale for the whole weight
        expected = (*stack, *block_grid(height, width, block))
        one = scale.numel == 1 and not stack and block == (height, width)
        if scale.shape != expected and not one:
            raise fault(
                scale, f"is {list(scale.shape)}, expected {list(expected)} for {list(codes.shape)} in blocks of {block}"
            )
        if scale.dtype not in ("F32", "BF16", "F16", "U8", "F8_E8M0"):
            raise fault(scale, f"has dtype {scale.dtype}, which is not a known dtype for a scale")
        exponents = "F8_E8M0" if scale.dtype in ("U8", "F8_E8M0") else None
        return ScaledBytes("block FP8", codes, scale, height, width, block, scale_dtype=exponents)

    def _four_bits(self, codes: TensorRef, scale: TensorRef) -> SmallFloats:
        height, half = codes.shape
        expected = (height, -(-2 * half // _FOUR_BIT_GROUP))
        if scale.shape != expected or scale.dtype not in ("U8", "F8_E8M0"):
            raise fault(
                scale, f"is {scale.dtype} {list(scale.shape)}, expected powers of two (U8 or F8_E8M0) {list(expected)}"
            )
        return SmallFloats("FP4", codes, scale, 2 * half, _FOUR_BIT_GROUP, scale_dtype="F8_E8M0")
