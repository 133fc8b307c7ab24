"""Options of the timing suites."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", type=int, default=64, help="image size of the timed networks")
    parser.addoption("--device", default="cpu", help="device of the timed networks")


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--size")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")
