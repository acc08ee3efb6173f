"""What an extraction looks at before it computes anything: whether both models belong together, and what is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mapconv.errors import BaseMismatchError, UnsupportedError
from mapconv.metadata.provenance import recorded_name
from mapconv.metadata.readme import read_readme
from mapconv.placement.finetunes import Finetune, MatrixPair, WholePair
from mapconv.placement.selection import module_rule, require_some
from mapconv.refit.extraction import Changes
from mapconv.wording import counted

#: Weights of one lineage have cosines near 1, unrelated ones near 0.
LEAST_COSINE = 0.5


def refuse_swapped(tuned: Path, base: Path) -> None:
    """Notice a base that says that it was made from the finetune.

    Raises:
        BaseMismatchError: the arguments look swapped, or are one folder.
    """
    if tuned.resolve() == base.resolve():
        raise BaseMismatchError(f"{tuned} is the base itself: give the model that it was finetuned from with --base.")
    named = read_readme(base / "README.md").metadata.get("base_model")
    own = recorded_name(tuned)[0].rstrip("/")
    for origin in named if isinstance(named, list) else [named]:
        if isinstance(origin, str) and origin.rstrip("/").rpartition("/")[2] == own.rpartition("/")[2]:
            raise BaseMismatchError(
                f"the card of {base} says that it was made from {origin}: FINETUNED and --base look swapped (--force "
                "goes on as it is)."
            )


def require_lineage(found: Finetune, changes: Changes, *, force: bool) -> list[str]:
    """Refuse models of equal shape whose weights have nothing to do with each other, and models that are equal.

    With ``force`` the former are accepted, and the note that says so returned.
    """
    base, tuned = found.base.folder, found.tuned.folder
    if not changes.matrices and not changes.wholes:
        raise UnsupportedError(f"{tuned} holds the same weights as {base}: there is nothing to extract.")
    if not changes.cosine < LEAST_COSINE:  # of NaN neither is true: the tensor that holds one is named by its refit
        return []
    measured = f"the weights of {tuned} have a cosine of {changes.cosine:.3f} with those of {base}"
    if not force:
        raise BaseMismatchError(
            f"{measured}, so it is a finetune of another model: give that one with --base, or pass --force to go on."
        )
    return [f"accepted with --force: {measured}"]


def selected(
    found: Finetune, changes: Changes, targets: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> tuple[list[MatrixPair], list[WholePair], int, list[str]]:
    """What goes into the result: matrices, whole tensors, how many stay the base's though they differ, and notes."""
    matrices, wholes, notes = list(changes.matrices), list(changes.wholes), []
    paths = [pair.path for pair in (*matrices, *wholes)]
    # A stack of experts goes by its own name or by that of the module that holds it.
    paths += [pair.module.path for pair in matrices if pair.stack is not None]
    paths += [part for name in found.unseen for part in (name, name.rpartition(".")[0])]
    before = _names(matrices, wholes)
    if targets is not None:
        require_some(module_rule(targets, "--targets"), paths, "--targets", targets)
        # A matrix that was not asked for stays the base's; norms and biases go with whatever is refitted.
        wholes = [pair for pair in wholes if not _is_matrix(pair) or pair.base is None]
    if exclude is not None:
        rule = module_rule(exclude, "--exclude")
        require_some(rule, paths, "--exclude", exclude)
        matrices = [pair for pair in matrices if not pair.is_named(rule)]
        wholes = [pair for pair in wholes if not rule(pair.path)]
    if not matrices:
        raise UnsupportedError(
            f"no matrix of {found.tuned.folder} that is to be refitted differs from {found.base.folder}: an adapter "
            "needs one."
        )
    left = len(before - _names(matrices, wholes))
    if left:
        notes.append(f"{counted(left, 'tensor')} that differ stay as the base has them (--targets, --exclude)")
    if found.unseen:
        names = found.unseen[0] + ", …" * (len(found.unseen) > 1)
        notes.append(f"left to the base unseen, as a file stores it in pieces (--targets, --exclude): {names}")
    large = [pair for pair in wholes if _is_matrix(pair)]
    if large:
        names = ", ".join(pair.parameter for pair in large[:3]) + ", …" * (len(large) > 3)
        nbytes = sum(pair.tuned.nbytes for pair in large)
        notes.append(f"{names} carried whole, {nbytes / 1e6:,.1f} MB: --exclude leaves such tensors to the base")
    return matrices, wholes, left, notes


def _names(matrices: Sequence[MatrixPair], wholes: Sequence[WholePair]) -> set[str]:
    return {pair.path for pair in matrices} | {pair.parameter for pair in wholes}


def _is_matrix(pair: WholePair) -> bool:
    return len(pair.tuned.shape) > 1
