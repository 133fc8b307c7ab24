"""Models that give something else in each call: what they read is named."""

import collections
import dataclasses
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


def local_classes(kind):
    """A network whose `forward` makes the class of what it holds, or of what it returns."""

    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            Pair = collections.namedtuple("Pair", "left right")

            @dataclasses.dataclass
            class Record:
                left: torch.Tensor

            class Plain:
                pass

            h = Pair(self.first(x).relu(), x)
            y = self.last(Record(h.left).left)
            if kind == "Plain":
                result = Plain()
                result.left = y
                return result
            return {"Pair": Pair(y, y), "Record": [Record(y)], "": y}[kind]

    return Made().eval()


def test_classes_that_a_forward_makes_for_itself_are_traced():
    a, x = local_classes(""), torch.randn(64, 4)
    for output in fxzip.compile_zip(a, fxzip.relabel(a, x), x, data=[x], progress=False)(x):
        torch.testing.assert_close(output, a(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Pair", "Record", "Plain"])
def test_classes_that_a_forward_makes_and_returns_are_named(kind):
    with pytest.raises(fxzip.TraceError, match=f"returns a `{kind}`, a class that it makes anew .* at module level"):
        fxzip.inspect(local_classes(kind), torch.randn(8, 4))
