"""Models that give something else in each call: what they read is named."""

import datetime
import os
import time
import uuid

import pytest
import torch
from torch import nn

import fxzip
from fxzip.tracing import trace


class Reads(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.a, self.what = nn.Linear(6, 3), what

    def forward(self, x):
        return self.a(x) * (1 + self.what(x))


UNSTEADY = {
    "`time.time` at": lambda x: time.time() % 7,
    "`datetime.now` at": lambda x: datetime.datetime.now().microsecond,
    "`urandom` at": lambda x: os.urandom(1)[0],
    "`posix.urandom` at": lambda x: uuid.uuid4().int % 1000,
    "`builtins.id` at": lambda x: id(x.clone()) % 1009,
}


@pytest.mark.parametrize("name", UNSTEADY)
def test_what_a_model_reads_beside_its_arguments_is_named(name):
    written = name.replace("`urandom", "`posix.urandom")
    with pytest.raises(fxzip.TraceError, match=rf"must give the same.*it calls {written} test_unsteady\.py:\d+\. Make"):
        trace(Reads(UNSTEADY[name]), torch.randn(4, 6))


def test_a_clock_that_changes_nothing_is_no_matter():
    net, x = Reads(lambda x: 0 * len(str(time.time()))).eval(), torch.randn(4, 6)
    torch.testing.assert_close(trace(net, x).module(x), net(x))
