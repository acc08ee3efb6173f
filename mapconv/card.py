"""The model card of a MAP directory."""

from __future__ import annotations

from mapconv.adapter import Adapter


def adapter_card(source: Adapter, base: str, *, plain_lora: bool) -> str:
    """A ``README.md`` that says what the folder is and how to load it."""
    tag = "lora" if plain_lora else "dora"
    return f"""---
base_model: {base}
base_model_relation: adapter
library_name: peft
tags: [map, {tag}]
---

# MAP adapter

Converted from a {source.method} adapter by mapconv. MAP (arXiv 2505.23094) treats each adapted weight as one vector
and writes it as `W' = α·W0/‖W0‖ + β·Δ/‖Δ‖`: a direction and two scalars, which `map_config.json` holds.

Stock PEFT loads it as it is:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

`mapconv merge path/to/this/folder -o merged` writes it into the base weights.
"""
