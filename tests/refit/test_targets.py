"""A target that is held whole is the same problem as one that is never formed."""

import pytest
import torch

from mapconv.algebra.moments import InputMoment
from mapconv.refit.solving import ModuleRefit, Wanted
from mapconv.refit.targets.base import DenseTarget
from tests.algebra.weights import random_weight

WANTED = Wanted("layer", 4, None, 16, None, torch.float32)


@pytest.mark.parametrize("with_inputs", [False, True])
def test_dense_target_has_the_solution_of_the_operator(with_inputs: bool) -> None:
    operator = random_weight(60, 40, 4, spread=0.1).operator
    S, W = operator.rows(0, 60, torch.float32)
    dense = DenseTarget(S, W)
    root = None
    if with_inputs:
        moment = InputMoment(40, "full")
        moment.add(torch.randn(200, 40, generator=torch.Generator().manual_seed(1)))
        root = moment.root()
    found = [
        ModuleRefit(target, WANTED, root, None if root is None else target.seen_through(root)).solve()
        for target in (operator, dense)
    ]
    one, two = (item.gain * (W.double() + item.B.double() @ item.A.double()) for item in found)
    assert torch.linalg.vector_norm(one - two) < 1e-5 * torch.linalg.vector_norm(S)
    assert found[0].error == pytest.approx(found[1].error, rel=1e-4)
    norms = [target.approximation_row_norms(found[0].B, found[0].A) for target in (operator, dense)]
    assert torch.allclose(*norms, rtol=1e-6)
