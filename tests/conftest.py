"""Every test starts from the same seed; one thread, since the networks are small and machines are shared."""

import os

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _own_timings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is timed here stays out of the user's cache folder."""
    os.environ["FXZIP_CACHE"] = str(tmp_path_factory.mktemp("timings"))
