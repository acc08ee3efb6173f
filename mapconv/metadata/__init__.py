"""What a result records of its making: provenance, the model card, its block in README.md."""
