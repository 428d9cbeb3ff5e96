"""Makes the project importable from tests/ and names the marker of the longer tests."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    config.addinivalue_line("markers",
                            "slow: takes more than a few seconds; leave out with -m 'not slow'")
