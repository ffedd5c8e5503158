"""The methods by what tests ask of them."""

from grape_ray.config.methods import METHODS

PRIVATE = [name for name, info in METHODS.items() if info.private]
EXACT = [name for name in PRIVATE if METHODS[name].exact]
# those that clip what a backward pass brings, not differences of losses
GRADIENT = [name for name in EXACT if METHODS[name].subspace != "directions"]
