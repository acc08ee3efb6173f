"""Safetensors on disk: headers without data, one tensor at a time, and outputs that appear whole or not at all."""
