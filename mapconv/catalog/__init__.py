"""Convert thousands of adapters in one run that can be stopped at any moment and gone on with.

A catalog file (``reading``) becomes jobs; an engine (``engines``) runs them on workers; the coordinating process alone
writes the ledger (``ledger``), from which a later run knows what is done. Nothing here imports torch but the work
itself (``work``), which runs in a worker.
"""
