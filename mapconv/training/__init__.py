"""Calibration training of a MAP adapter (MATH.md section 7): losses, models, the loop, and what it can resume from."""
