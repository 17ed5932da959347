from __future__ import annotations

import pytest

from tests.slurm.cluster import Cluster, lacking


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Three nodes; tests that kill one switch it on again."""
    if why := lacking():
        pytest.skip(why)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
