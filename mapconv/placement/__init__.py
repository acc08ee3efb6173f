"""Place every tensor of an adapter on exactly one base tensor, or list what does not fit."""
