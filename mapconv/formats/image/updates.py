"""From the tensors of one module to the update that they make: factors, their rank, and their scaling.

A module's parts say which kind it is. Every update is two factors in the end (``Module``); one that is stored in
another way has them computed, and itself by rows as ``delta``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from mapconv.adapter import Addition, Module, TensorRef
from mapconv.checkpoint.derived import Identity, derived, reshaped
from mapconv.errors import AdapterError
from mapconv.formats.image import products
from mapconv.formats.image.keys import KeyParts
from mapconv.formats.image.products import Side
from mapconv.spelling import Axis, Rescaling

_FLOATS = ("F32", "F16", "BF16")
#: Parts that add to a vector, or replace a tensor: (the last part of its name, whether it replaces).
ADDITIONS = {
    "diff_b": ("bias", False),
    "w_norm": ("weight", False),
    "b_norm": ("bias", False),
    "set_weight": ("weight", True),
}
#: Parts that say of which kind an update is.
LOW_RANK, HADAMARD, KRONECKER, DENSE = ("down", "up"), ("w1_a", "w1_b", "w2_a", "w2_b"), ("kw1", "kw1_a"), ("diff",)


def additions_of(parts: KeyParts) -> Iterator[Addition]:
    """What a module's tensors do to vectors; a full difference of a vector is one of them."""
    for part, ref in parts.tensors.items():
        leaf, replaces = ADDITIONS.get(part, ("weight", False))
        if part in ADDITIONS or _is_vector(part, ref):
            yield Addition(parts.path, parts.spelling, leaf, _float(ref), replaces)


def update_of(parts: KeyParts) -> KeyParts | None:
    """The tensors that make the update of a weight; None where there are none."""
    tensors = {part: ref for part, ref in parts.tensors.items() if part not in ADDITIONS and not _is_vector(part, ref)}
    if not tensors or (set(tensors) == {"alpha"} and len(tensors) < len(parts.tensors)):
        return None
    return replace(parts, tensors=tensors)


def _is_vector(part: str, ref: TensorRef) -> bool:
    return part == "diff" and len(ref.shape) < 2


def module_of(parts: KeyParts, alpha: float | None) -> Module:
    """One module's update.

    Raises:
        AdapterError: a part missing or of another shape.
    """
    named = parts.tensors
    kinds = [kind for kind in (LOW_RANK, HADAMARD, KRONECKER, DENSE) if any(part in named for part in kind)]
    if len(kinds) != 1:
        known = " and ".join(ref.name for ref in named.values())
        raise AdapterError(f"{_file(parts)}: {known} make no update: the file is incomplete, or of two dialects.")
    builders = {LOW_RANK: _low_rank, HADAMARD: _hadamard, KRONECKER: _kronecker, DENSE: _dense}
    module = builders[kinds[0]](parts, alpha)
    scale, magnitude = named.get("dora_scale"), named.get("magnitude")
    if magnitude is not None:
        return replace(module, magnitude=_of_outputs(module, _float(magnitude)))
    if scale is None:
        return module
    return replace(module, magnitude=_float(scale), rescaling=Rescaling(_axis(module, scale)))


def _of_outputs(module: Module, magnitude: TensorRef) -> TensorRef:
    """PEFT's magnitudes, which diffusers and ai-toolkit write as well: those of the outputs, in any shape.

    Raises:
        AdapterError: another number of them.
    """
    height, _ = module.weight_shape
    if magnitude.numel != height or max(magnitude.shape, default=0) != height:
        raise AdapterError(f"{magnitude.file}: {magnitude.name} is {list(magnitude.shape)}, expected {[height]}.")
    return magnitude


def _axis(module: Module, scale: TensorRef) -> Axis | None:
    """Whose norms the magnitudes are, by their shape; None where it fits both.

    Raises:
        AdapterError: they fit neither.
    """
    height, width = module.weight_shape
    shape = scale.shape
    # A convolution's inputs are channels, each of which is several columns.
    inputs = width // math.prod(module.lora_A.shape[2:])
    if len(shape) > 1 and shape[1] and width % shape[1] == 0:
        inputs = shape[1]
    if len(shape) > 1:
        # A 1 says which way they lie: (out, 1, …) or (1, in, …).
        rows, columns = shape[0] == height and scale.numel == height, shape[1] == inputs and scale.numel == inputs
        if rows != columns:
            return "out" if rows else "in"
        if rows and columns and 1 in (height, inputs):
            return "out"
    elif scale.numel in (height, inputs):
        if height == inputs:
            return None
        return "out" if scale.numel == height else "in"
    raise AdapterError(
        f"{scale.file}: {scale.name} is {list(shape)}, expected {[height, 1]} or {[1, inputs]} for a weight "
        f"{[height, width]}."
    )


def _low_rank(parts: KeyParts, alpha: float | None) -> Module:
    """``s·up·down``, of a Tucker decomposition with the core between them; without an alpha s is 1."""
    down, up = required(parts, "down"), required(parts, "up")
    core = parts.tensors.get("mid")
    rank = down.shape[0] if down.shape else 0
    if core is not None:
        if len(core.shape) < 3 or core.shape[:2] != (rank, rank) or down.numel != rank * _dimension(down, 1):
            raise unfit(core, down)
        shape = (rank, down.shape[1], *core.shape[2:])
        down = derived(down.name, shape, products.TuckerDown((_float(core), down)))
    kernel = down.shape[2:]
    if len(down.shape) < 2 or rank < 1 or up.numel != _dimension(up, 0) * rank or up.shape[1:2] != (rank,):
        raise unfit(down, up)
    up = reshaped(up, (up.shape[0], rank, *(1 for _ in kernel)))
    return _module(parts, rank, scaling_of(alpha, rank), down, up)


def _hadamard(parts: KeyParts, alpha: float | None) -> Module:
    one, two = (
        Side(required(parts, f"{name}_a"), required(parts, f"{name}_b"), _optional(parts, core))
        for name, core in (("w1", "t1"), ("w2", "t2"))
    )
    _check_sides(one, two)
    if one.shape != two.shape:
        raise unfit(one.left, two.left)
    assert one.right is not None  # required above
    scaling = scaling_of(alpha, one.right.shape[0])
    factors = products.HadamardLeft, products.HadamardRight
    return _product(parts, scaling, one, two, one.shape, products.Hadamard, factors)


def _kronecker(parts: KeyParts, alpha: float | None) -> Module:
    one, two = _kronecker_side(parts, "kw1"), _kronecker_side(parts, "kw2")
    _check_sides(one, two)
    shape = one.shape[0] * two.shape[0], one.shape[1] * two.shape[1]
    # The rank is that of a side in factors; without any the alpha has nothing to be divided by, and is ignored.
    ranks = [side.rank for side in (one, two) if side.right is not None]
    scaling = scaling_of(alpha, ranks[0]) if ranks else 1.0
    factors = products.KroneckerLeft, products.KroneckerRight
    return _product(parts, scaling, one, two, shape, products.Kronecker, factors)


def _kronecker_side(parts: KeyParts, name: str) -> Side:
    if name in parts.tensors:
        return Side(required(parts, name))
    return Side(required(parts, f"{name}_a"), required(parts, f"{name}_b"), _optional(parts, "kt2" * (name == "kw2")))


def _product(
    parts: KeyParts,
    scaling: float,
    one: Side,
    two: Side,
    shape: tuple[int, int],
    update: type[products.Update],
    factors: tuple[type[products.Product], type[products.Product]],
) -> Module:
    stored = (*one.stored, *two.stored)
    left, right = (made(stored, one, two) for made in factors)
    delta = derived(parts.path, shape, update(stored, one, two, shape[1]))
    rank = one.rank * two.rank
    if rank >= min(shape):
        return _whole(parts, scaling, delta)
    A, B = derived(parts.path, (rank, shape[1]), right), derived(parts.path, (shape[0], rank), left)
    return replace(_module(parts, rank, scaling, A, B), delta=delta)


def _dense(parts: KeyParts, alpha: float | None) -> Module:
    diff = required(parts, "diff")
    if len(diff.shape) < 2:
        raise AdapterError(f"{diff.file}: {diff.name} is {list(diff.shape)}, expected a matrix.")
    return _whole(parts, 1.0, reshaped(diff, (diff.shape[0], diff.numel // max(1, diff.shape[0]))))


def _whole(parts: KeyParts, scaling: float, delta: TensorRef) -> Module:
    """An update of any rank: one of its two factors is itself, the other the identity."""
    height, width = delta.shape
    rank = min(height, width)
    identity = derived(parts.path, (rank, rank), Identity((delta.stored[0],), rank))
    A, B = (delta, identity) if height < width else (identity, delta)
    return replace(_module(parts, rank, scaling, A, B), delta=delta)


def _module(parts: KeyParts, rank: int, scaling: float, A: TensorRef, B: TensorRef) -> Module:
    return Module(parts.path, rank, scaling, A, B, spelling=parts.spelling)


def _check_sides(*sides: Side) -> None:
    for side in sides:
        left, right, core = side.left, side.right, side.core
        if right is None:
            fits = len(left.shape) >= 2
        elif core is not None:
            fits = len(left.shape) == len(right.shape) == 2 and core.shape[:2] == (left.shape[0], right.shape[0])
        else:
            fits = len(left.shape) == 2 and len(right.shape) >= 2 and left.shape[1] == right.shape[0]
        if not fits or 0 in (*left.shape, *(() if right is None else right.shape)):
            raise unfit(left, right or left)


def required(parts: KeyParts, part: str) -> TensorRef:
    """A part that the module cannot do without.

    Raises:
        AdapterError: it is not there, or not of a floating-point dtype.
    """
    ref = parts.tensors.get(part)
    if ref is None:
        known = next(known for name, known in parts.tensors.items() if name != "alpha" or len(parts.tensors) == 1)
        raise AdapterError(f"{known.file}: {known.name} has no counterpart ({part}): the file is incomplete.")
    return _float(ref)


def _optional(parts: KeyParts, part: str) -> TensorRef | None:
    return _float(parts.tensors[part]) if part in parts.tensors else None


def _float(ref: TensorRef) -> TensorRef:
    if ref.dtype not in _FLOATS:
        raise AdapterError(f"{ref.file}: {ref.name} has dtype {ref.dtype}, expected one of {', '.join(_FLOATS)}.")
    return ref


def _dimension(ref: TensorRef, number: int) -> int:
    return ref.shape[number] if len(ref.shape) > number else 0


def _file(parts: KeyParts) -> str:
    return str(next(iter(parts.tensors.values())).file)


def scaling_of(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def unfit(one: TensorRef, other: TensorRef) -> AdapterError:
    shapes = f"{one.name} is {list(one.shape)} and {other.name} is {list(other.shape)}"
    return AdapterError(f"{one.file}: {shapes}: no factors of one weight.")


def finite(value: float, ref: TensorRef) -> float:
    """A scalar of the file.

    Raises:
        AdapterError: NaN or infinity.
    """
    if not math.isfinite(value):
        raise AdapterError(f"{ref.file}: {ref.name} is {value}, expected a number.")
    return value
