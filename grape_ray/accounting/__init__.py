"""What steps cost: mechanisms, and epsilon, noise and number of steps each from the other two. No
torch, no ray.
"""

from grape_ray.accounting.calibration import affords, epsilon, noise_multiplier, steps_within
from grape_ray.accounting.mechanism import Mechanism

__all__ = ["Mechanism", "affords", "epsilon", "noise_multiplier", "steps_within"]
