"""Every option's name, type, default, help and rules, once; nothing here imports torch.

Three views of it: the command line (``mapconv.cli.options``), the public functions (``Command.checks``) and the catalog
file (``mapconv.catalog.checking``). A new option is a record in ``shared`` or ``commands`` and a parameter of the
command's function; a new command is a ``Command`` there.
"""
