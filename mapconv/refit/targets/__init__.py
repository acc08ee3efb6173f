"""Where the weight T of a refit comes from: one file a source."""
