"""Which base values to merge into, where the adapter was trained on a quantized copy and the original is at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mapconv.checkpoint.filenames import MODEL_CONFIG
from mapconv.checkpoint.gguf.header import is_gguf
from mapconv.checkpoint.model_config import read_model_config
from mapconv.checkpoint.quantization import quantization_settings
from mapconv.commands.verify import run_both
from mapconv.data import Rows, read_rows
from mapconv.errors import CheckpointError, DataError
from mapconv.fidelity.comparison import Comparison
from mapconv.formats import read_adapter
from mapconv.hub.locate import locate_base, original_of_base
from mapconv.placement.adapters import PlacedAdapter, place_adapter
from mapconv.runtime.devices import resolve_device

BaseValues = Literal["original", "stored", "measured"]
#: Sequences of 256 tokens that ``measured`` runs on.
MEASURED_SAMPLES = 8


@dataclass(frozen=True)
class ChosenBase:
    """The base to merge into, and what is recorded of the choice."""

    base: str | Path
    record: dict[str, Any]

    @property
    def note(self) -> str:
        """The choice in one sentence."""
        record = self.record
        text = f"merged into the {record['chosen']} values ({self.base})"
        if record.get("kl") is not None:
            text += f": its outputs on both differ by KL {record['kl']:.3g} over {record['positions']:,} positions"
        if record.get("perplexity_stored") is not None:
            text += (
                f", with perplexity {record['perplexity_original']:.4f} on the original values and "
                f"{record['perplexity_stored']:.4f} on the stored ones"
            )
        return text


def choose_base(
    source: Path,
    base: str | Path | None,
    values: BaseValues,
    *,
    original: str | Path | None = None,
    data: str | Path | None = None,
    samples: int = MEASURED_SAMPLES,
    allow_pickle: bool = False,
    quiet: bool = True,
) -> ChosenBase:
    """Settle whether an adapter is merged into what a quantized base stands for, or into the model it was made from.

    ``measured`` runs the adapter on both and takes the one under which the data is likelier: KL(data ‖ model) is the
    mean negative log-likelihood but for a constant. A model without perplexity stays on the stored values, on which it
    was trained.

    Raises:
        CheckpointError: a base that is not quantized, or an original that nothing names.
    """
    adapter = read_adapter(source, allow_pickle=allow_pickle)
    named = (base, adapter.base, adapter.revision, source)
    plain = original
    if values != "stored" and plain is None:
        plain = original_of_base(*named)
    if values == "original":
        assert plain is not None  # found above
        return ChosenBase(plain, {"chosen": "original"})
    folder = locate_base(*named)
    if quantization_settings(folder, _config(folder)) is None:
        raise CheckpointError(
            f"{folder} is not quantized: --base-values {values} is for a base that is (--base), with the model that it "
            "was made from as --original."
        )
    if values == "stored":
        return ChosenBase(folder, {"chosen": "stored"})
    assert plain is not None  # found above
    stored, other = (place_adapter(source, where, allow_pickle=allow_pickle) for where in (folder, plain))
    record = _measure(source, stored, other, read_rows(data), samples=samples, quiet=quiet)
    return ChosenBase(plain if record["chosen"] == "original" else folder, record)


def _measure(
    source: Path, stored: PlacedAdapter, original: PlacedAdapter, rows: Rows, *, samples: int, quiet: bool
) -> dict[str, Any]:
    """Run the adapter on both bases, and say which of them the data prefers."""
    device = resolve_device("auto")
    compared = Comparison(source, stored, dtype="float32", device=device, result_base=original, quiet=quiet)
    total, _, _ = run_both(compared, rows, stored.target.folder, samples=samples, quiet=quiet)
    if not total.result.positions:
        raise DataError(f"{stored.target.folder} needs more than text to run: choose its --base-values by name.")
    on_stored, on_original = (sums.means(causal=compared.is_causal) for sums in (total.source, total.result))
    # Mean losses: KL(data ‖ model) but for the data's own entropy.
    new, old = on_original.loss, on_stored.loss
    likelier = compared.is_causal and new is not None and old is not None and new < old
    return {
        "chosen": "original" if likelier else "stored",
        "kl": on_original.kl,
        "positions": total.result.positions,
        "perplexity_stored": on_stored.perplexity,
        "perplexity_original": on_original.perplexity,
    }


def _config(folder: Path) -> dict[str, Any]:
    return read_model_config(folder) if is_gguf(folder) or (folder / MODEL_CONFIG).is_file() else {}
