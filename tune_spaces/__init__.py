"""Tune spaces: each module has ``space() -> dict`` of Ray Tune domains, and ``study()``, what all
trials have in common.
"""
