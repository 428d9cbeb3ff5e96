"""Makes the project importable from tests/ and names the marker of the longer tests."""
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "core")]
if "PYTEST_XDIST_WORKER" in os.environ:             # pytest -n: one thread each; read by torch
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    config.addinivalue_line("markers",
                            "slow: takes more than a few seconds; leave out with -m 'not slow'")
