"""The parity matrix: model families × adapter options, with stock PEFT and transformers as the oracle."""
