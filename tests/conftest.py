"""One thread for torch: models here are tiny, and threads that wait for each other cost more than they bring."""

import ctypes
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    # No GPU driver: Triton's kernels run in its interpreter, which has to be said before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What engines learn of speed belongs to nobody's home; the processes that tests start inherit the place."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch  # takes seconds

    torch.set_num_threads(1)
