"""Whole runs: each module holds a function of its own name that returns a frozen Config."""
