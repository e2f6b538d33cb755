"""Which device, how much memory, and what follows from both."""
