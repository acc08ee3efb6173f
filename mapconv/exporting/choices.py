"""What an export is written as: the format, the layout of experts, and what is said where something does not fit."""

from __future__ import annotations

from pathlib import Path

from mapconv.errors import UnsupportedError
from mapconv.exporting.experts import Layout, adapts_experts
from mapconv.exporting.formats import FORMATS
from mapconv.exporting.ggufnames import gguf_config, has_expert_stacks
from mapconv.exporting.limits import Limits
from mapconv.exporting.servers import Server
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.skeleton import typed_model_config
from mapconv.untrusted.schema import shown
from mapconv.wording import counted

_SHOWN = 6


def format_for(to: str | None, server: Server | None) -> str:
    """The format that is asked for, or the one that the server reads.

    Raises:
        UnsupportedError: the server does not read it.
    """
    if to is None:
        assert server is not None  # the options' rules see to it
        return server.formats[0]
    if server is not None and to not in server.formats:
        raise UnsupportedError(
            f"{server.title} does not read {FORMATS[to].title}: give --to {' or '.join(server.formats)}, or leave --to "
            "out."
        )
    return to


def layout_for(given: Layout | None, to: str, server: Server | None, placed: PlacedAdapter) -> Layout | None:
    """How experts are written; None: as the adapter has them.

    Raises:
        UnsupportedError: the format or the server has another layout.
    """
    if given is not None and to != "peft":
        raise UnsupportedError(f"--experts {given} is a layout in PEFT's files, and {FORMATS[to].title} has its own.")
    if given is not None and server is not None and given not in server.experts:
        takes = " or ".join(server.experts) or "none of them"
        raise UnsupportedError(
            f"{server.title} does not read experts as --experts {given} writes them: it takes {takes}."
        )
    if to == "mlx":
        return "switch"
    if to == "gguf":
        return "gguf" if adapts_experts(placed) and has_expert_stacks(gguf_config(placed)) else None
    stacked = any(item.experts > 1 for item in placed.modules)
    return server.experts[0] if given is None and server is not None and server.experts and stacked else given


def require_model(placed: PlacedAdapter, server: Server | None) -> None:
    """Refuse a base that the server takes no adapters for."""
    if server is None:
        return
    checkpoint = placed.target.checkpoint
    if (checkpoint.models or checkpoint.is_file) and not server.pipelines:
        raise UnsupportedError(
            f"{placed.target.folder} is a model of images, and {server.title} runs language models: pass --for "
            "comfyui, or --to diffusers, kohya or comfyui without --for."
        )
    if server.architectures is None:
        return
    kind = typed_model_config(placed.target.folder).get("model_type")
    if kind not in server.architectures:
        raise UnsupportedError(
            f"{placed.target.folder} is a model of the type {shown(kind)}, and {server.title} takes adapters for "
            f"{' and '.join(server.architectures)} alone: merge it with `mapconv merge`."
        )


def cannot_hold(source: Path, limits: Limits, names: list[str]) -> str:
    """Why parts of an adapter are not written, and what to do."""
    some = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return (
        f"{source} has {counted(len(names), 'part')} that {limits.reader} does not take ({some}): pass --fold-into "
        "BASE_OUT to have them merged into a copy of the base."
    )


def server_notes(server: Server | None, rank: int) -> list[str]:
    """What the server has to be told."""
    if server is None or server.usual_rank is None or rank <= server.usual_rank:
        return []
    return [f"start {server.title} with {server.rank_option.format(rank=server.started_with(rank))}"]
