"""Initial factors that PEFT takes out of the base weight when it loads an adapter: computed as PEFT computes them.

Loading such an adapter re-runs the initialization and replaces the base by ``W − s·B0·A0`` (PEFT's ``pissa_init`` and
``olora_init``, in float32). B0·A0 is a function of the weight alone, so the right merge is ``W − s·B0·A0 + s·B·A``.
"""

from __future__ import annotations

import torch


def initial_factors(name: str, base: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(B0, A0) of shapes (out, rank) and (rank, in) for ``pissa`` or ``olora`` on a base weight (out, in).

    Signs of singular vectors are free, but cancel in the product, which is all that is used.
    """
    if name == "pissa":
        left, values, right = torch.linalg.svd(base, full_matrices=False)
        roots = (values[:rank] / scaling).sqrt()
        return left[:, :rank] * roots, roots[:, None] * right[:rank]
    if name == "olora":
        Q, R = torch.linalg.qr(base)
        return Q[:, :rank].contiguous(), R[:rank].contiguous()
    raise ValueError(f"unknown initialization {name!r}")
