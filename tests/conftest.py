"""Every test starts from the same seed; one thread, since the networks are small and machines are shared."""

import os

import pytest
import torch

from fxzip.compiler import affording, timing
from fxzip.widths import latency

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _few_rounds() -> None:
    """Timings are of few rounds: how exact they are matters to few tests, which ask for more."""
    timing.SECONDS, affording.SECONDS, latency.SECONDS = 0.0, 1.0, 0.1


@pytest.fixture(autouse=True, scope="session")
def _own_timings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is timed here stays out of the user's cache folder."""
    os.environ["FXZIP_CACHE"] = str(tmp_path_factory.mktemp("timings"))
