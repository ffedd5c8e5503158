"""What is verified by value before a pass may be trusted: ownership, repetition, no memory."""
