"""What leaves this machine, and its upload."""
