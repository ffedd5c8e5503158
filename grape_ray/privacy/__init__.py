"""The mechanism of a step: types, keys, random streams, clipping, noise."""
