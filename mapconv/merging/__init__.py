"""Merge placed adapters into base weights: the plan, and the tensors it computes."""
