"""Every test starts from the same seed; one thread, since the networks are small and machines are shared."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
