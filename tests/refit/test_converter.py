"""When a LoRA's scaling can be folded into its factors without a look at what it lost, and the memory of a refit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mapconv.refit.converter import _loses_nothing
from mapconv.refit.plan import ConvertOptions, plan_upgrade
from mapconv.spelling import PEFT_DORA


@pytest.mark.parametrize("scaling", [1.0, 2.0, 64.0, 0.5, 0.25, 0.0, 1.5, 3.0, 16 / 9, 2**0.5, -1.0, -2.0])
def test_exact_scalings_are_known(scaling):
    smallest = torch.finfo(torch.float32).smallest_normal
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    values = torch.cat([values, values * 2 * smallest, torch.arange(-50.0, 50.0) * 2.0**-149])
    exact = torch.equal((values * scaling).double(), values.double() * scaling)
    assert not _loses_nothing(scaling) or exact
    assert _loses_nothing(scaling) == (scaling in (1.0, 2.0, 64.0))


@pytest.mark.parametrize(
    ("options", "dense"),
    [
        ({}, False),
        ({"rank": 1024}, True),
        ({"tolerance": 0.05, "max_rank": 1024}, True),
        ({"direction": "dora"}, False),
    ],
)
def test_working_bytes_count_what_the_refit_takes(options, dense):
    """Three float64 Gram matrices of a 2048 × 2048 weight alone are six times what its float32 values take."""
    weight = SimpleNamespace(shape=(2048, 2048), numel=2048 * 2048)
    module = SimpleNamespace(magnitude=object(), is_dense=False, delta=None, rescaling=PEFT_DORA, method=None)
    placed = SimpleNamespace(weight=weight, effective_rank=16, initialization=None, module=module)
    taken = plan_upgrade(SimpleNamespace(modules=(placed,)), ConvertOptions(**options)).jobs[0].working_bytes
    assert taken > 6 * 4 * weight.numel if dense else taken == 4 * weight.numel
