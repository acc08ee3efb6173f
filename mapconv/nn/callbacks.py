"""What ``transformers.Trainer`` and TRL's trainers can be told of a MAP adapter besides its loss."""

from __future__ import annotations

import statistics
from typing import Any

from transformers import TrainerCallback

from mapconv.nn.attaching import state_of, update_sizes


class LogUpdateSizes(TrainerCallback):
    """Log how far β moves the weights, whenever the trainer logs: the quartiles of |β|/‖W0‖ over the weights.

    >>> Trainer(model, ..., callbacks=[LogUpdateSizes()])
    """

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **_: Any) -> None:
        if model is None or (name := state_of(model).active) is None:
            return
        sizes = [size for own in update_sizes(model, name).values() for size in own]
        low, median, high = statistics.quantiles(sizes, n=4, method="inclusive") if len(sizes) > 1 else sizes * 3
        values = {"update_size_q1": low, "update_size_median": median, "update_size_q3": high}
        for table in (logs, state.log_history[-1] if state.log_history else None):
            if table is not None:
                table.update(values)
