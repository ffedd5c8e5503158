"""Ranks together: reduce and gather of coordinates, and models larger than one device (FSDP2)."""
