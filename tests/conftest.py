"""Every test starts from the same seed; one thread, since the networks are small and machines are shared."""

import os
import time
from collections import defaultdict
from zlib import crc32

# Before torch and NumPy read it; workers and the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from fxzip.compiler import affording, timing
from fxzip.widths import latency

torch.set_num_threads(1)
_END = pytest.StashKey[float]()  # the time after which no test begins


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is `thinned(n)` one case in n is run by default, the others are slow. Of its slow cases the CI
    script runs one in n.

    Which ones is a matter of their names, so that every value of every parameter has its turn somewhere.
    """
    families = defaultdict(list)
    for item in items:
        if item.get_closest_marker("thinned"):
            families[item.nodeid.partition("[")[0], bool(item.get_closest_marker("slow"))].append(item)
    for cases in families.values():
        (share,) = cases[0].get_closest_marker("thinned").args
        ordered = sorted(cases, key=lambda case: crc32(case.name.encode()))
        for case in ordered[max(1, round(len(cases) / share)) :]:
            case.add_marker(pytest.mark.slow)
            case.add_marker(pytest.mark.hours)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--minutes`: tests that have not begun by then are skipped, so that sweeps fit on a slow machine, too."""
    parser.addoption("--minutes", type=float, default=float("inf"), help="skip tests that have not begun by then")


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_END] = time.monotonic() + 60 * session.config.getoption("--minutes")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() > item.config.stash[_END]:
        pytest.skip("the time that `--minutes` gives is up")


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
