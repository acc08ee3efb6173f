"""One command's work each: plan, run, check, write. The command line and the public API are thin over these.

A package of its own, because importing a module ``mapconv.merge`` would hide the function ``mapconv.merge``.
"""
