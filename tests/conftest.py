"""Settings of the whole suite: few threads, no hub, no usage reports."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from grape_ray.orchestrate.cluster import set_defaults

set_defaults(60)  # tune spaces import Ray, which must have been told by then
