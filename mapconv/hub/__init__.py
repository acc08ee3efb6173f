"""The Hugging Face Hub, both ways: what a command names is found there, and what it made is published there.

Nothing is imported here, and ``huggingface_hub`` where it is used, so that ``mapconv --help`` waits for neither.
"""
