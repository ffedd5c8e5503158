"""Verification by value: which rows belong to which example, and that an example's loss depends on
nothing else.
"""
