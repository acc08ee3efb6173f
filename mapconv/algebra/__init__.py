"""The pure core: tensors in, tensors out. No paths, no logging, no global random state."""
