"""GGUF, llama.cpp's single-file form of a model: header, block types, and the models whose tensors it is known to hold.

The file says all by itself: weights in blocks, sizes in its metadata, the vocabulary too. What transformers calls them
and how it wants them is this package's work.
"""
