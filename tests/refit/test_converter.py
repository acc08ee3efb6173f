"""When a LoRA's scaling can be folded into its factors without a look at what it lost."""

from __future__ import annotations

import pytest
import torch

from mapconv.refit.converter import _loses_nothing


@pytest.mark.parametrize("scaling", [1.0, 2.0, 64.0, 0.5, 0.25, 0.0, 1.5, 3.0, 16 / 9, 2**0.5, -1.0, -2.0])
def test_exact_scalings_are_known(scaling):
    smallest = torch.finfo(torch.float32).smallest_normal
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    values = torch.cat([values, values * 2 * smallest, torch.arange(-50.0, 50.0) * 2.0**-149])
    exact = torch.equal((values * scaling).double(), values.double() * scaling)
    assert not _loses_nothing(scaling) or exact
    assert _loses_nothing(scaling) == (scaling in (1.0, 2.0, 64.0))
