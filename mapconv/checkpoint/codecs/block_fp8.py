"""FP8 by blocks (DeepSeek's form, ``quant_method: fp8``): ``w = code · weight_scale_inv``, a product despite the name.

The size of a block is the configuration's alone: shapes do not tell it where the last block is short.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.base import EncodedTensor, QuantizedModel, fault
from mapconv.checkpoint.codecs.scaled import ScaledBytes, block_grid
from mapconv.errors import CheckpointError, UnsupportedError

#: (ending of the codes' name, ending of the scales'); experts may be stacked under names of their own.
_PAIRS = (
    (".weight", ".weight_scale_inv"),
    (".gate_up_proj", ".gate_up_proj_scale_inv"),
    (".down_proj", ".down_proj_scale_inv"),
)


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
                yield model.encoded(codes.name, codes.shape, self._encoding(codes, scale, block, model))

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
    ) -> ScaledBytes:
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
