"""Training and held-out data as sequences of tokens, from text, chats, or labelled texts."""

from mapconv.data.blocks import IGNORED, Dataset
from mapconv.data.reading import Objective, read_blocks, read_dataset
from mapconv.data.rows import Rows, read_rows

__all__ = ["IGNORED", "Dataset", "Objective", "Rows", "read_blocks", "read_dataset", "read_rows"]
