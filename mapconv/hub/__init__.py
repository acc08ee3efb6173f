"""The Hugging Face Hub, both ways: what a command names is found there, and what it made is published there.

``huggingface_hub`` is imported where it is used, so that ``mapconv --help`` does not wait for it.
"""

from mapconv.hub.locate import (
    hub_reference,
    is_folder,
    locate_adapter,
    locate_base,
    locate_result,
    open_base,
    open_model,
    original_of_base,
)

__all__ = [
    "hub_reference",
    "is_folder",
    "locate_adapter",
    "locate_base",
    "locate_result",
    "open_base",
    "open_model",
    "original_of_base",
]
