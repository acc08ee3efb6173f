"""Every kind of update of an image adapter as a file has it, and what it adds to a weight by its own formula."""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensors = dict[str, torch.Tensor]
#: (tensors by ending, Δ in float64) for a weight's shape.
Made = tuple[Tensors, torch.Tensor]
RANK, ALPHA = 2, 3.0


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * 0.3


def _matrix(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return _random(generator, shape[0], int(torch.tensor(shape[1:]).prod()))


def low_rank(shape: torch.Size, generator: torch.Generator, down="lora_down.weight", up="lora_up.weight") -> Made:
    ones = (1,) * (len(shape) - 2)
    a, b = _random(generator, RANK, *shape[1:]), _random(generator, shape[0], RANK, *ones)
    delta = (b.double().flatten(1) @ a.double().flatten(1)).view(shape)
    return {down: a, up: b, "alpha": torch.tensor(ALPHA)}, ALPHA / RANK * delta


def tucker(shape: torch.Size, generator: torch.Generator) -> Made:
    if len(shape) == 2:
        return low_rank(shape, generator)
    a, b = _random(generator, RANK, shape[1], 1, 1), _random(generator, shape[0], RANK, 1, 1)
    core = _random(generator, RANK, RANK, *shape[2:])
    delta = torch.einsum("mnxy,im,nj->ijxy", core.double(), b.double()[..., 0, 0], a.double()[..., 0, 0])
    tensors = {"lora_down.weight": a, "lora_up.weight": b, "lora_mid.weight": core, "alpha": torch.tensor(ALPHA)}
    return tensors, ALPHA / RANK * delta


def loha(shape: torch.Size, generator: torch.Generator) -> Made:
    sides = [_random(generator, shape[0], RANK) for _ in "12"], [_matrix(generator, RANK, *shape[1:]) for _ in "12"]
    one, two = (left.double() @ right.double() for left, right in zip(*sides, strict=True))
    tensors = {f"hada_w{n + 1}_{part}": sides[m][n] for n in (0, 1) for m, part in enumerate("ab")}
    return tensors | {"alpha": torch.tensor(ALPHA)}, ALPHA / RANK * (one * two).view(shape)


def loha_tucker(shape: torch.Size, generator: torch.Generator) -> Made:
    if len(shape) == 2:
        return loha(shape, generator)
    tensors: Tensors = {"alpha": torch.tensor(ALPHA)}
    sides = []
    for number in "12":
        core = tensors[f"hada_t{number}"] = _random(generator, RANK, RANK, *shape[2:])
        a = tensors[f"hada_w{number}_a"] = _random(generator, RANK, shape[0])
        b = tensors[f"hada_w{number}_b"] = _random(generator, RANK, shape[1])
        sides.append(torch.einsum("ijxy,jr,ip->prxy", core.double(), b.double(), a.double()))
    return tensors, ALPHA / RANK * sides[0] * sides[1]


def _lokr(one: tuple[str, ...], two: tuple[str, ...]) -> Callable[[torch.Size, torch.Generator], Made]:
    def made(shape: torch.Size, generator: torch.Generator) -> Made:
        kernel = shape[2:]
        tensors: Tensors = {"alpha": torch.tensor(ALPHA)}
        small, large = (2, 2), (shape[0] // 2, shape[1] // 2, *kernel)
        sides = []
        for name, parts, size in (("w1", one, small), ("w2", two, large)):
            if not parts:
                whole = tensors[f"lokr_{name}"] = _random(generator, *size)
                sides.append(whole.double().view(size))
            elif parts == ("t",) and kernel:
                core = tensors["lokr_t2"] = _random(generator, RANK, RANK, *kernel)
                a = tensors[f"lokr_{name}_a"] = _random(generator, RANK, size[0])
                b = tensors[f"lokr_{name}_b"] = _random(generator, RANK, size[1])
                sides.append(torch.einsum("ijxy,ip,jr->prxy", core.double(), a.double(), b.double()))
            else:
                a = tensors[f"lokr_{name}_a"] = _random(generator, size[0], RANK)
                b = tensors[f"lokr_{name}_b"] = _matrix(generator, RANK, *size[1:])
                sides.append((a.double() @ b.double()).view(size))
        first = sides[0].reshape(*sides[0].shape, *(1 for _ in kernel))
        scale = ALPHA / RANK if one or two else 1.0
        return tensors, scale * torch.kron(first.contiguous(), sides[1].contiguous())

    return made


def full(shape: torch.Size, generator: torch.Generator) -> Made:
    diff = _random(generator, *shape)
    return {"diff": diff}, diff.double()


KINDS: dict[str, Callable[[torch.Size, torch.Generator], Made]] = {
    "low-rank": low_rank,
    "tucker": tucker,
    "loha": loha,
    "loha-tucker": loha_tucker,
    "lokr": _lokr((), ()),
    "lokr-w2": _lokr((), ("a", "b")),
    "lokr-both": _lokr(("a", "b"), ("a", "b")),
    "lokr-tucker": _lokr((), ("t",)),
    "full": full,
}
