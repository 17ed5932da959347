from __future__ import annotations

import pytest

from tests.hosts.network import Unavailable, two_hosts


@pytest.fixture
def hosts():
    """Two hosts, or a skip that says why there are none."""
    try:
        network = two_hosts()
        pair = network.__enter__()
    except Unavailable as why:
        pytest.skip(str(why))
    try:
        yield pair
    finally:
        network.__exit__(None, None, None)
