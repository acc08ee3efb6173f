"""unit/: the parts. parity/: stock PEFT as the oracle. property/: hostile files. cli/: what a user meets."""
