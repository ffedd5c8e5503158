"""Measurements that anyone can repeat: every method beside the non-private loop and the peers, in
one run on one machine.
"""
