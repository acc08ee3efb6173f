"""Calibration training of a MAP adapter: losses, models, the loop, and what it can resume from.

The gradients are those of ``mapconv.algebra``, section 7.
"""
