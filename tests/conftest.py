"""One thread for torch: models here are tiny, and threads that wait for each other cost more than they bring."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch  # takes seconds

    torch.set_num_threads(1)
