"""Runs and sweeps on Ray: the only room that imports it."""
