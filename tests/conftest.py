"""Settings of all tests."""

import os


# As in trainers/cli.py, and as early as pytest lets us: OpenMP reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
