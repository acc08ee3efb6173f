"""Adapters whose names only the base can resolve: what each of its modules is called by other programs."""
