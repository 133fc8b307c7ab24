"""The self-check sees wrong rules where outputs say nothing, and says where it sees nothing."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.analysis import check, label
from fxzip.analysis.rules import RULES
from fxzip.errors import PinnedSpaceWarning, SelfCheckError
from fxzip.tracing import trace

OUTPUTS = {
    "argmax": lambda y: y.argmax(-1),
    "sign": lambda y: torch.sign(y),
    "rounded": lambda y: (y / 1e6).round(),
    "saturated": lambda y: torch.sigmoid(1e4 * y),
    "one_hot": lambda y: F.one_hot(y.argmax(-1), 3),
    "sharp": lambda y: torch.softmax(1e5 * y, -1),
    "dead": lambda y: torch.relu(y - 1e6),
    "tiny": lambda y: 1.0 + 1e-30 * y,
    "nan": lambda y: torch.sqrt(-1 - y * y),
    "compared": lambda y: y > 1e5,
    "constant": lambda y: 0 * y,
    "read for its shape": lambda y: torch.zeros_like(y),
}


class Hidden(nn.Module):
    """A network with a residual sum with a flipped copy, gates and a norm, and an output that tells little."""

    def __init__(self, output):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(5, 7), nn.Linear(14, 3)
        self.norm, self.output = nn.LayerNorm(7), OUTPUTS[output]

    def forward(self, x):
        y = torch.tanh(self.a(x))
        y = self.b(y + y.flip(-1))
        z = torch.cat([torch.relu(self.norm(y)), torch.softmax(self.c(x), -1)], -1)
        return self.output(self.d(z))


def unmoved_flip(call):
    return call.operand(call.args[0]).fields


def swapped_cat(call):
    parts = [call.operand(part) for part in reversed(call.args[0])]
    return (torch.cat([labels for part in parts for labels in part.fields], -1),)


def free_norm(call):
    return [call.operand(call.args[0]).fields, (), ()]


def hidden(output, rules=RULES):
    torch.manual_seed(0)
    return label(trace(Hidden(output).eval(), torch.randn(4, 5)), rules)


@pytest.mark.parametrize("output", OUTPUTS)
def test_right_rules_pass(output):
    with warnings.catch_warnings():
        warnings.simplefilter("error", PinnedSpaceWarning)
        found = check(hidden(output))
    assert found.error < 1e-12
    assert not found.unseen
    assert sorted(space.size for space in found.spaces.spaces if space.name != "d.weight") == [7, 7]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(
    ("name", "rule", "culprits"),
    [
        ("flip", unmoved_flip, {"a.weight"}),
        ("cat", swapped_cat, {"b.weight", "c.weight"}),
        ("native_layer_norm", free_norm, {"b.weight", "norm.weight"}),
    ],
)
@pytest.mark.thinned(2)
def test_wrong_rules_are_caught_behind_outputs_that_say_nothing(output, name, rule, culprits):
    labelling = hidden(output, RULES | {name: rule})
    try:
        with pytest.warns(PinnedSpaceWarning) as caught:
            found = check(labelling)
    except SelfCheckError:
        return
    assert any(f"`{culprit}`" in str(warning.message) for culprit in culprits for warning in caught)
    assert found.error < 1e-7
    assert found.pinned


def test_the_first_node_that_is_wrong_is_named():
    with pytest.warns(PinnedSpaceWarning, match=r"relabelling it moved the value of node `flip` by \d"):
        check(hidden("dead", RULES | {"flip": unmoved_flip}))


class Unseen(nn.Module):
    """Features that nothing can be told of: they are multiplied by zero before they are read."""

    def __init__(self, factor):
        super().__init__()
        self.a, self.b, self.c, self.factor = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 3), factor

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(y * self.factor)))


def test_what_cannot_be_seen_is_named():
    model, x = Unseen(0.0), torch.randn(4, 5)
    found = check(label(trace(model, x), RULES))
    assert found.unseen == ("a.weight",)
    assert not found.pinned
    note = "not checked: the space of `a.weight`; nothing in the model shows, on random parameters, where its features"
    assert note in str(fxzip.inspect(model, x))
    zipped = fxzip.compile_zip(model, Unseen(0.0), x, progress=False)
    assert [n for n in zipped.report["notes"] if n.startswith(f"model 1: {note}")]
    assert not check(label(trace(Unseen(1.0), x), RULES)).unseen


def test_other_parameters_are_tried_where_the_first_ones_hide_something():
    """Dead at parameters around one; alive at larger ones."""

    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x):
            y = torch.relu(self.a(x) - 20)
            return self.b(y + y.flip(-1))

    model, x = Far(), torch.randn(4, 5)
    assert not check(label(trace(model, x), RULES)).unseen
    with pytest.warns(PinnedSpaceWarning, match="`a.weight`"):
        found = check(label(trace(model, x), RULES | {"flip": unmoved_flip}))
    assert found.pinned


def test_values_that_rounding_moves_are_no_evidence():
    """A node that holds rounding alone, and one that compares by it."""

    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 16), nn.Linear(16, 3)

        def forward(self, x):
            y = self.a(x)
            rest = (y - y.mean(-1, True)).mean(-1, True)
            return self.b(torch.tanh(y)) + 1e-30 * (rest > 0)

    with warnings.catch_warnings():
        warnings.simplefilter("error", PinnedSpaceWarning)
        found = check(label(trace(Noise(), torch.randn(4, 5)), RULES))
    assert [space.size for space in found.spaces.spaces] == [16]


class CrossCovariance(nn.Module):
    """Attention over features: its matrix carries two fields that share the axis of the heads."""

    def __init__(self, heads=2, width=8):
        super().__init__()
        self.heads = heads
        self.qkv, self.o, self.head = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, 3)
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 4, 1).unbind(0)
        scores = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).transpose(-2, -1)
        y = (scores * self.temperature).softmax(-1) @ v
        return self.head(self.o(y.permute(0, 3, 1, 2).reshape(b, n, c)).mean(1))


def test_fields_that_share_an_axis_move_together():
    found = check(label(trace(CrossCovariance(), torch.randn(2, 5, 8)), RULES))
    assert found.error < 1e-9
    assert not found.pinned
    assert not found.unseen
