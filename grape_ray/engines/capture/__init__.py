"""How per-example gradients are caught: tracked parameters, taps, and which rows belong to which
example.
"""
