"""What strangers wrote: shown so that it cannot pass for ours, and read in bounded time and memory."""
