"""Capturing per-example gradients: tracked parameters, taps at each of their uses, and which rows
belong to which example.
"""
