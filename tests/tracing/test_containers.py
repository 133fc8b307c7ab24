"""Containers of inputs and outputs: taken apart, put together, and each head's own."""

import collections
import copy
import pickle
import types
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fxzip
from fxzip.errors import ContainerError
from fxzip.tracing import difference, ladder, trace
from fxzip.tracing.containers import Part, flatten, leaves, map_leaves
from fxzip.tracing.structure import Rebuild


@dataclass
class Out:
    logits: Any
    features: Any = None
    classes: int = field(default=7, init=False)


@dataclass(frozen=True)
class Frozen:
    logits: Any
    features: Any = None


class Named(NamedTuple):
    logits: Any
    features: Any


class Slots:
    __slots__ = ("features", "logits")

    def __init__(self, logits, features):
        self.logits, self.features = logits, features


class Plain:
    def __init__(self, logits, features):
        self.logits, self.features, self.kind = logits, features, "plain"


class Attributes(dict):
    def __init__(self, **given):
        super().__init__(**given)
        self.__dict__ = self


class Ordered(collections.OrderedDict):
    """As outputs of other libraries are: the same tensors as attributes and as items."""

    def __init__(self, logits, features):
        super().__init__(logits=logits, features=features)
        self.logits, self.features = logits, features


class Items(collections.UserDict):
    pass


class Listed(list):
    pass


KINDS = {
    "dataclass": lambda y, h: Out(y, h),
    "frozen dataclass": lambda y, h: Frozen(y, h),
    "nested dataclass": lambda y, h: Out(Frozen([y], {"h": h})),
    "named tuple": lambda y, h: Named(y, h),
    "slots": Slots,
    "plain object": Plain,
    "namespace": lambda y, h: types.SimpleNamespace(logits=y, features=h),
    "dict that is its attributes": lambda y, h: Attributes(logits=y, features=h),
    "dict with attributes": Ordered,
    "UserDict": lambda y, h: Items(logits=y, features=h),
    "defaultdict": lambda y, h: collections.defaultdict(list, logits=y, features=[h]),
    "list": lambda y, h: Listed([y, Plain(h, None)]),
    "deque": lambda y, h: collections.deque([y, h], maxlen=2),
    "dict of objects": lambda y, h: {"a": [Out(y)], "b": Plain(None, h)},
}


class Net(nn.Module):
    def __init__(self, classes, kind):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head, self.kind = nn.Linear(16, classes), kind

    def forward(self, x):
        features = self.body(x)
        return KINDS[self.kind](self.head(features), features)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_apart_is_put_together_again(kind):
    value = KINDS[kind](torch.ones(2), torch.zeros(3))
    found, structure = flatten(value)
    assert sorted(len(leaf) for leaf in found) == [2, 3]
    for again in (structure, pickle.loads(pickle.dumps(structure))):
        built = again.build([leaf + 5 for leaf in found])
        assert type(built) is type(value)
        assert [(len(leaf), float(leaf[0])) for leaf in leaves(built)] == [(len(t), float(t[0]) + 5) for t in found]
    assert difference(map_leaves(torch.clone, value), value) is None
    assert difference(map_leaves(lambda t: t + 1, value), value) is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rung", ladder.RUNGS)
def test_outputs_are_traced_on_every_rung(kind, rung, monkeypatch):
    if rung != "symbolic" and kind not in ("nested dataclass", "dict with attributes", "slots"):
        pytest.skip("the same code")
    monkeypatch.setattr(ladder, "RUNGS", (rung,))
    net = Net(3, kind).double().eval()
    program = trace(net, torch.randn(4, 8, dtype=torch.float64))
    x = torch.randn(5, 8, dtype=torch.float64)
    assert difference(program.module(x), net(x)) is None


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", KINDS)
def test_heads_keep_what_they_return(kind):
    torch.manual_seed(0)
    a, b = (Net(n, kind).double().eval() for n in (3, 4))
    x = torch.randn(32, 8, dtype=torch.float64)
    wide = fxzip.compile_zip(a, b, x, data=[x], method="permute", refit=None, width=2.0, progress=False)
    for network in (wide, copy.deepcopy(wide), pickle.loads(pickle.dumps(wide))):
        for k, model in enumerate((a, b)):
            assert difference(network(x)[k], model(x)) is None
            assert difference(network.single(k)(x), model(x)) is None
    twin = fxzip.relabel(a, x)
    assert difference(twin(x), a(x)) is None
    found = fxzip.compile_zip(a, twin, x, data=[x], method="permute", refit=None, progress=False)(x)
    assert difference(found[1], a(x)) is None


def test_a_nested_part_of_the_output_is_its_own_heads():
    """Logits of as many classes, in an object in an object: two tasks, not one."""
    torch.manual_seed(0)
    a, b = (Net(3, "nested dataclass") for _ in range(2))
    x = torch.randn(64, 8)
    found = fxzip.compile_zip(a, b, x, data=[x], method="permute", refit=None, progress=False)(x)
    assert not torch.allclose(found[0].logits.logits[0], found[1].logits.logits[0])


class Batch:
    def __init__(self, x, mask):
        self.x, self.extra, self.name = x, {"mask": mask}, "batch"


class Reads(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.a, self.h = nn.Linear(8, 16), nn.Linear(16, classes)

    def forward(self, batch, scale=None):
        hidden = torch.relu(self.a(batch.x)) * batch.extra["mask"]
        return self.h(hidden if scale is None else hidden * scale["by"])


@pytest.mark.parametrize("rung", ladder.RUNGS)
def test_inputs_in_objects(rung, monkeypatch):
    monkeypatch.setattr(ladder, "RUNGS", (rung,))
    net = Reads(3).eval()
    batches = [Batch(torch.randn(n, 8), torch.rand(n, 1)) for n in (4, 5)]
    scaled = {"by": torch.rand(4, 1)}
    for sample, other in ((batches[0], (batches[1],)), ((batches[0], scaled), (batches[0], scaled))):
        program = trace(net, sample)
        torch.testing.assert_close(program.module(*other), net(*other))


def test_inputs_in_objects_are_zipped():
    a, b = Reads(3).eval(), Reads(2).eval()
    data = [Batch(torch.randn(16, 8), torch.rand(16, 1)) for _ in range(2)]
    zipped = fxzip.compile_zip(a, b, (data[0],), data=[(own,) for own in data], width=2.0, method="permute", refit=None)
    for k, model in enumerate((a, b)):
        torch.testing.assert_close(zipped(data[1])[k], model(data[1]), rtol=1e-4, atol=1e-5)
    message = r"`batch` must be .* traced with, one with 2 tensors and \('batch',\); found one with 1 tensors and \(\)"
    with pytest.raises(fxzip.SpecializationError, match=message):
        zipped(types.SimpleNamespace(x=data[0].x))


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.fc, self.what = nn.Linear(8, 4), what

    def forward(self, x):
        return self.what(self.fc(x))


class Loop:
    def __init__(self, x):
        self.x, self.me = x, self


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda y: None, "must return at least one tensor; found none in the `NoneType`"),
        (lambda y: 3, "must return at least one tensor; found none in the `int`"),
        (lambda y: y.detach().numpy(), "must return at least one tensor; found none in the `ndarray`"),
        (lambda y: [], "must return at least one tensor; found none in the `list`"),
        (Loop, "found some in a `Loop`, and it holds itself"),
        (lambda y: {y}, "found some in a `set`"),
        (lambda y: (row for row in [y]), "found some in a `generator`"),
        (lambda y: (y, {"a": [y + 1]}.values()), "found some in a `dict_values`, and it cannot be copied"),
        (lambda y: (y, {"a": y + 1}.items()), "found some in a `dict_items`, and it cannot be copied"),
        (lambda y: (y, types.MappingProxyType({"a": y + 1})), "found some in a `mappingproxy`, and it cannot be"),
        (lambda y: torch.nested.nested_tensor([y[0], y[1, :2]]), "found a nested one. Return its parts, padded"),
        (lambda y: torch.quantize_per_tensor(y, 0.1, 0, torch.qint8), "found a quantized one. Return it by `.deq"),
    ],
)
def test_what_is_no_container_is_refused(what, message):
    with pytest.raises(fxzip.TraceError, match=message):
        trace(Returns(what), torch.ones(2, 8))


def test_a_part_of_another_container():
    with pytest.raises(ContainerError, match="must hold 2 tensors, as the sample input did; found 1"):
        Part(1, 2)(types.SimpleNamespace(x=torch.ones(1)))


def test_calls_on_containers_are_compared_by_structure():
    one, other = (Rebuild(flatten(Out(torch.ones(n)))[1]) for n in (1, 2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Rebuild(flatten(Frozen(torch.ones(1)))[1])
    assert (one.__name__, Part(0, 1).__name__) == ("Out", "part")


class Task(Enum):
    LABELS = 1
    SCORES = "scores"


class ByTask(nn.Module):
    """Outputs under members of an `Enum`, and members among them, in plain containers and in an object."""

    def __init__(self, held):
        super().__init__()
        self.body, self.head, self.held = nn.Linear(6, 8), nn.Linear(8, 3), held

    def forward(self, x):
        return self.held(self.head(torch.relu(self.body(x))))


HELD = {
    "keys": lambda y: {Task.LABELS: y.argmax(1), Task.SCORES: [y, Task.SCORES]},
    "values": lambda y: (y, Task.LABELS, {"task": Task.SCORES}),
    "in an object": lambda y: types.SimpleNamespace(task=Task.LABELS, of={Task.SCORES: y}),
}


@pytest.mark.parametrize("name", HELD)
def test_members_of_an_enum(name):
    torch.manual_seed(0)
    a, b = (ByTask(HELD[name]).eval() for _ in range(2))
    x = torch.randn(32, 6)
    zipped = fxzip.compile_zip(a, b, x[:4], data=[x], progress=False, width=2, method="zip", refit=None)
    for found, model in zip(zipped(x), (a, b), strict=True):
        (mine, ours), (theirs, wanted) = flatten(found), flatten(model(x))
        assert repr(ours) == repr(wanted)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other)


def test_sparse_outputs_are_refused_by_name():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()

    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net(x).to_sparse()

    with pytest.raises(fxzip.TraceError, match=r"must return dense tensors; found one of layout `torch.sparse_coo`"):
        fxzip.compile_zip(Sparse(), Sparse(), torch.randn(4, 6), progress=False)
