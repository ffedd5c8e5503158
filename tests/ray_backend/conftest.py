"""One local Ray cluster for the whole session."""

import pytest

from grape_ray.ray_backend.cluster import set_defaults, start_local


@pytest.fixture(scope="session")
def ray_cluster():
    """Four logical CPUs, loopback only; ended with the session."""
    set_defaults(60)
    import ray

    start_local(4)
    yield
    ray.shutdown()
