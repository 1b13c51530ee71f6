"""Whether engines run on this GPU at all: RTX names no Hopper GPU among those it compiles for."""

import pytest

from tests.gpu.building import describe

pytestmark = pytest.mark.gpu


def test_some_way_to_build_runs_here(gpu, toolkit, tried, record_property):
    """Fails with every way and its refusal; what comes after this is skipped then."""
    record_property("runs_here", describe(gpu, toolkit, tried))
    assert any(not each.refused for each in tried), describe(gpu, toolkit, tried)
