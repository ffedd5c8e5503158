"""Settings of the whole suite: few threads, no hub, no usage reports, and nothing of the user's own
touched.
"""

import os
import tempfile

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# no answer of an earlier session; removed at exit
_CACHE = tempfile.TemporaryDirectory(prefix="grape-ray-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

from grape_ray.ray_backend.cluster import set_defaults  # noqa: E402  (the settings above come first

set_defaults(60)  # tune spaces import Ray, which must have been told by then


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path_factory):
    """Each test is a user of its own: what one has registered of datasets and sweeps, another does
    not know.
    """
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data-home")))
