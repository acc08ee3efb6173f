"""What each server takes of an adapter: one row for each server.

A rule is what the server's own reader does, in the file that the comment names. What a server would load and then
compute wrongly (a field that it does not read) counts as refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mapconv.adapter import Adapter
from mapconv.exporting.experts import Layout
from mapconv.wording import counted


@dataclass(frozen=True)
class Server:
    """The limits of one server.

    Args:
        name: as ``--for`` has it.
        title: as it is written.
        as_of: the month of the sources that were read; empty where they bore no date.
        formats: what it loads, the first by default.
        largest_rank: of any module; None: no limit.
        usual_rank: what it takes unless it is started with ``rank_option``.
        rank_option: the option that raises the limit, with the rank in ``{rank}``.
        rank_choices: the ranks that this option takes; empty: any.
        rslora: whether it divides by the root of the rank where the adapter says so.
        patterns: whether modules may differ in rank and alpha.
        dora: whether it computes DoRA.
        saved_modules: ends of names of whole weights that it takes with an adapter.
        embeddings: whether it takes factors of an embedding.
        stacks: whether it takes the factors of a stack of experts as PEFT has them.
        experts: the layouts of experts that it takes instead, the first by default.
        architectures: model types that it can adapt; None: every one that it runs.
        pipelines: whether it runs models of images.
    """

    name: str
    title: str
    as_of: str
    formats: tuple[str, ...]
    largest_rank: int | None = None
    usual_rank: int | None = None
    rank_option: str = ""
    rank_choices: tuple[int, ...] = ()
    rslora: bool = False
    patterns: bool = False
    dora: bool = False
    saved_modules: tuple[str, ...] = ()
    embeddings: bool = False
    stacks: bool = False
    experts: tuple[Layout, ...] = ()
    architectures: tuple[str, ...] | None = None
    pipelines: bool = False

    def started_with(self, rank: int) -> int:
        """The least value of ``rank_option`` for an adapter of this rank."""
        return next((choice for choice in self.rank_choices if choice >= rank), rank)


SERVERS = (
    # vllm/lora/peft_helper.py (scaling, refusals), vllm/lora/lora_model.py (names), vllm/config/lora.py (ranks).
    Server(
        "vllm",
        "vLLM",
        "",
        ("peft",),
        largest_rank=512,
        usual_rank=16,
        rank_option="--max-lora-rank {rank}",
        rank_choices=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        rslora=True,
        embeddings=True,
        experts=("split",),
    ),
    # python/sglang/srt/lora/lora.py (scaling), lora_config.py, lora_manager.py (admission).
    Server("sglang", "SGLang", "", ("peft",), experts=("split", "sglang")),
    # tensorrt_llm/lora_manager.py.
    Server(
        "tensorrt-llm",
        "TensorRT-LLM",
        "",
        ("peft",),
        largest_rank=64,
        rslora=True,
        dora=True,
        saved_modules=("lm_head", "embed_tokens"),
    ),
    # src/llama-adapter.cpp, convert_lora_to_gguf.py.
    Server("llama.cpp", "llama.cpp", "", ("gguf",), patterns=True, embeddings=True),
    # llm/llama: one adapter a model, read by llama.cpp; server/create.go.
    Server("ollama", "Ollama", "2026-08", ("gguf",), patterns=True, architectures=("llama", "gemma2")),
    # server/lorax_server/adapters/lora.py.
    Server("lorax", "LoRAX", "2026-05", ("peft",), rslora=True),
    # comfy/lora.py, comfy/weight_adapter/lora.py; alpha and rank are each module's own.
    Server("comfyui", "ComfyUI", "2025-10", ("comfyui", "kohya", "diffusers"), patterns=True, pipelines=True),
)
BY_NAME = {server.name: server for server in SERVERS}


#: The format that each dialect is, as ``--to`` names it; dialects by the names that they have in ``formats``.
_WRITTEN = {
    "PEFT": "peft",
    "llama.cpp (GGUF)": "gguf",
    "kohya's sd-scripts": "kohya",
    # Kohya's keys with LyCORIS' endings, which whoever reads the one reads as well.
    "LyCORIS": "kohya",
    "MLX-LM": "mlx",
    "diffusers": "diffusers",
    "ComfyUI": "comfyui",
}


def faults(adapter: Adapter, server: Server) -> Iterator[str]:
    """Why the server would refuse the adapter as it is, or compute something else with it; one phrase each."""
    if _WRITTEN.get(adapter.dialect) not in server.formats:
        yield f"it is in the form of {adapter.dialect}, and {server.title} reads {' or '.join(server.formats)}"
    if any(module.method is not None for module in adapter.modules):
        yield f"it is a {adapter.method} of PEFT's, and {server.title} takes LoRA alone"
    if not adapter.modules:
        yield f"it adapts no layer by factors, and {server.title} takes nothing else"
    ranks = {module.rank for module in adapter.modules}
    if server.largest_rank is not None and ranks and max(ranks) > server.largest_rank:
        yield f"its rank is {max(ranks)}, and {server.title} takes {server.largest_rank} at most"
    settings = adapter.settings
    if not server.patterns and not settings.by_module:
        named = [name for name in ("rank_pattern", "alpha_pattern") if adapter.config.get(name)]
        if named:
            yield f"{' and '.join(named)} in its configuration {'are' if len(named) > 1 else 'is'} not read"
    if settings.use_rslora and not server.rslora:
        yield "use_rslora is not read, so that its updates would be scaled by alpha/r instead of alpha/√r"
    if settings.use_dora and not server.dora:
        yield f"it is a DoRA, which {server.title} refuses, or computes otherwise than it was trained"
    if settings.initialization is not None:
        yield f"init_lora_weights is {settings.initialization}, so its factors belong to a changed base"
    yield from _unsupported_parts(adapter, server)


def _unsupported_parts(adapter: Adapter, server: Server) -> Iterator[str]:
    whole = sorted(
        item.parameter
        for item in adapter.whole
        if item.rows is not None or not item.parameter.removesuffix(".weight").endswith(server.saved_modules)
    )
    if whole:
        yield f"it brings {counted(len(whole), 'whole tensor')} ({_few(whole)}), which it does not take"
    biased = [module.path for module in adapter.modules if module.bias is not None]
    if biased:
        yield f"it has biases of its own ({_few(biased)}), which it does not take"
    embedded = [module.path for module in adapter.modules if module.embedding]
    if embedded and not server.embeddings:
        yield f"it adapts embeddings ({_few(embedded)}), which it does not take"
    if adapter.settings.target_parameters and not server.stacks:
        yield f"it adapts stacks of experts ({_few(adapter.settings.target_parameters)}), which it does not take"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
