"""Accounting for differential privacy: what a step costs, which keys it may use, and the ledger that it is paid from."""

from grape_ray.accounting.calibration import affords, epsilon, noise_multiplier, steps_within
from grape_ray.accounting.events import Mechanism
from grape_ray.accounting.ledger import Grant, Ledger
from grape_ray.accounting.records import Study
from grape_ray.accounting.verify import Report, verify

__all__ = ["Grant", "Ledger", "Mechanism", "Report", "Study", "affords", "epsilon", "noise_multiplier", "steps_within", "verify"]
