"""What was paid: the durable, hash-chained ledger of one dataset, and its audit. No torch, no
ray.
"""

from grape_ray.ledger.audit import Report, verify
from grape_ray.ledger.entries import Study
from grape_ray.ledger.grant import Grant
from grape_ray.ledger.ledger import Ledger

__all__ = ["Grant", "Ledger", "Report", "Study", "verify"]
