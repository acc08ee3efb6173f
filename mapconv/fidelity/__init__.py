"""Check a result against its source: as functions, weight by weight, and in the saved report."""
