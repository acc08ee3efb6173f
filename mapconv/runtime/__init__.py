"""What a command runs on: devices, threads, progress, and models loaded through transformers and PEFT."""
