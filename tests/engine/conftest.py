"""The policy that tests of one file share: not to be changed."""

import pytest
from decoding_alone import new_spread_policy


@pytest.fixture(scope="module")
def policy():
    return new_spread_policy()
