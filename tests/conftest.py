"""Settings of all tests."""

import os


# As in trainers/cli.py, and as early as pytest lets us: OpenMP reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

from tests.environments import build_wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The path of the built wheel."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))
