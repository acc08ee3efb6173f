"""PEFT's methods beyond LoRA: each layer built by stock PEFT around one base weight, and merged by its own code."""
