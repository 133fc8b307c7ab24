"""Label algebra, and every rule against what the call does to values.

The oracle: run a call on random values, relabel its operands by a random relabelling that the constraints allow, and
compare with the relabelled result.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxzip
from fxzip.analysis.dispatch import LabelMode
from fxzip.analysis.label_state import State
from fxzip.analysis.rules import FIXED, RULES, VOID, Constraints, ConstraintStore, Operand, compress, varying
from fxzip.analysis.rules.axis_labels import along
from fxzip.analysis.rules.meeting import meet, merged_fields
from fxzip.analysis.solver import Solver, units_of

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@st.composite
def fields(draw, sizes=None):
    """A tensor's shape and one of its fields, distinct labels on the axes along which it varies."""
    shape = sizes or draw(SIZES)
    varied = [n if draw(st.booleans()) else 1 for n in shape]
    count = int(np.prod(varied))
    return shape, torch.arange(1, count + 1).reshape(varied)


@given(fields())
def test_compress_undoes_expand(drawn):
    shape, labels = drawn
    assert torch.equal(compress(labels.expand(shape)), labels)
    assert torch.equal(compress(labels.expand(shape).contiguous()), labels)
    assert torch.equal(compress(labels).expand(shape), labels.expand(shape))


@given(fields())
def test_varying(drawn):
    shape, labels = drawn
    full = labels.expand(shape)
    for axis, size in enumerate(shape):
        differs = bool((full != full.narrow(axis, 0, 1)).any())
        assert differs == (axis in varying(labels))
        assert size > 1 or not differs


@given(st.integers(1, 5), st.integers(0, 3), st.integers(1, 3))
def test_along(size, axis, more):
    labels = along(torch.arange(size), axis, axis + more)
    assert labels.shape[axis] == size
    assert labels.numel() == size


@given(fields(), st.data())
def test_project_keeps_members_apart(drawn, data):
    shape, labels = drawn
    axes = frozenset(data.draw(st.sets(st.integers(0, len(shape) - 1))))
    store = started(labels)
    blocks = store.project(labels, axes)
    if not axes & varying(labels):
        assert blocks is None
        return
    assert varying(blocks) == axes & varying(labels)
    if varying(labels) <= axes:
        assert blocks is labels
        return
    (pairs,) = store.constraints.blocks
    assert sorted(pairs[1].tolist()) == sorted(labels.unique().tolist())
    assert len(pairs[0].unique()) == blocks.numel()


def test_places_with_the_same_members_are_one_block():
    """Heads laid behind one another for every sample: a block is a head, wherever it occurs."""
    store = ConstraintStore()
    heads = store.fresh(1, 2, 3)
    rows = heads.expand(4, 2, 3).reshape(8, 3)
    blocks = store.project(rows, frozenset({0}))
    assert torch.equal(blocks.reshape(4, 2), blocks[:2].reshape(1, 2).expand(4, 2))
    assert len(blocks.unique()) == 2
    (pairs,) = store.constraints.blocks
    assert {tuple(pair) for pair in pairs.T.tolist()} == {(7 + h, 1 + 3 * h + d) for h in range(2) for d in range(3)}


@pytest.mark.parametrize("held", [True, False])
def test_operands_over_the_same_axes_are_related_once(held):
    """Of four operands three pairs say it all; one with a place that holds no feature meets all others."""
    store = ConstraintStore()
    fields = [store.fresh(1, 5) for _ in range(4)]
    if not held:
        fields[1] = fields[1].clone()
        fields[1][0, 0] = FIXED
    operands = [Operand(torch.zeros(2, 5), (labels,), False, frozenset()) for labels in fields]
    meet(store, operands, "`add`")
    assert len(store.constraints.equal) == (3 if held else 5)
    solver = Solver(
        store.size, torch.cat(store.constraints.equal, 1).numpy(), np.zeros((2, 0), np.int64),
        np.zeros(store.size, np.int64), [("", "")],
    )  # fmt: skip
    for place in range(5):
        together = {int(solver.klass[labels[0, place]]) for labels in fields if labels[0, place] > 0}
        assert len(together) == 1
    pinned = {label for pin in store.constraints.pins for label in pin.labels.tolist()}
    assert pinned == (set() if held else {int(labels[0, 0]) for k, labels in enumerate(fields) if k != 1})


@given(SIZES, st.data())
def test_relate(sizes, data):
    """Equal where both vary along the same axes, blocks where one is coarser, a common block otherwise."""
    _, f = data.draw(fields(sizes))
    _, g = data.draw(fields(sizes))
    g = g + f.numel()
    store = started(f, g)
    store.relate(f, g)
    shared = varying(f) & varying(g)
    constraints = store.constraints
    if not shared:
        assert not constraints.equal
        assert not constraints.blocks
    elif varying(f) == varying(g):
        assert not constraints.blocks
        assert set(map(tuple, torch.cat(constraints.equal, 1).T.tolist())) == set(
            zip(f.reshape(-1).tolist(), g.reshape(-1).tolist(), strict=True)
        )
    else:
        assert not constraints.equal
        members = set(torch.cat(constraints.blocks, 1)[1].tolist())
        finer = [labels for labels in (f, g) if varying(labels) != shared]
        assert members == {label for labels in finer for label in labels.unique().tolist()}


@given(fields(), st.data())
def test_mix_leaves_what_is_outside(drawn, data):
    shape, labels = drawn
    axes = frozenset(data.draw(st.sets(st.integers(0, len(shape) - 1))))
    store = started(labels)
    rest = store.mix(labels, axes)
    if not axes & varying(labels):
        assert rest is labels
        assert not store.constraints.touched
    else:
        assert (frozenset() if rest is None else varying(rest)) == varying(labels) - axes
        assert store.constraints.touched[0][0] == "mix"


@given(fields(), st.data())
def test_fix_says_whether_anything_can_move(drawn, data):
    shape, labels = drawn
    axes = frozenset(data.draw(st.sets(st.integers(0, len(shape) - 1))))
    store = started(labels)
    assert store.fix(labels, axes, "a test") == bool(varying(labels) and varying(labels) <= axes)
    assert len(store.constraints.pins) == bool(axes & varying(labels))


@given(fields(), st.permutations(range(4)))
def test_place_follows_values(drawn, order):
    shape, labels = drawn
    axes = list(order[: len(shape)])
    operand = Operand(torch.zeros(shape), (labels,), False, frozenset())
    (placed,) = operand.place(axes, 4).fields
    assert varying(placed) == {axes[a] for a in varying(labels)}


@given(SIZES, st.data())
def test_merged_fields_keep_the_finer(sizes, data):
    _, f = data.draw(fields(sizes))
    _, g = data.draw(fields(sizes))
    kept = [varying(labels) for labels in merged_fields([(f,), (g,)])]
    assert kept == sorted(kept, key=len, reverse=True)
    assert set().union(*kept) == varying(f) | varying(g)
    assert not any(a < b for a in kept for b in kept)


def started(*runs):
    store = ConstraintStore()
    store.fresh(max(int(run.max()) for run in runs))
    return store


def test_equal_with_void_and_fixed():
    store = ConstraintStore()
    labels = store.fresh(4)
    store.equal(labels, torch.tensor([VOID, FIXED, 3, 4]))
    assert not store.constraints.equal
    reasons = {pin.reason: pin.labels.tolist() for pin in store.constraints.pins}
    assert reasons["it is added to values that carry no feature"] == [2]
    assert list(reasons) == ["it is added to values that carry no feature", "padded places keep to themselves"]
    (pairs,) = store.constraints.blocks
    assert pairs[1].tolist() == [1]


def test_block_with_fixed():
    store = ConstraintStore()
    labels = store.fresh(3)
    store.block(torch.tensor([FIXED, 2]), labels[[0, 2]])
    store.block(labels[:2], torch.tensor([FIXED, 3]))
    reasons = [(pin.reason, pin.labels.tolist()) for pin in store.constraints.pins]
    assert reasons == [
        ("its block meets values that carry no feature", [1]),
        ("it holds values that carry no feature", [1]),
    ]


# The oracle ----------------------------------------------------------------------------------------------------------


class Bench:
    """Tensors with labels, one call on them, and the relabellings that the constraints allow."""

    def __init__(self, call, tensors, axes, static=()):
        self.call, self.tensors = call, tensors
        self.state = State(RULES, where="node `here`")
        self.fields = []
        for place, (tensor, own) in enumerate(zip(tensors, axes, strict=True)):
            store = self.state.store
            runs = tuple(along(store.fresh(tensor.shape[a]), a, tensor.ndim) for a in own)
            entry = self.state.entry(tensor)
            entry.fields, entry.static, entry.learned, entry.known = runs, place in static, place in static, False
            self.state.held[id(tensor)] = entry
            self.fields.append(runs)
        with torch.no_grad(), LabelMode(self.state):
            self.out = call(*tensors)
        self.constraints: Constraints = self.state.store.constraints

    def pinned(self):
        return {label for pin in self.constraints.pins for label in pin.labels.tolist()}

    def outputs(self):
        return [self.out] if isinstance(self.out, Tensor) else [t for t in self.out if isinstance(t, Tensor)]

    def relabelling(self, seed):
        """A random legal permutation of labels: units and members of units at random, kinds by axis."""
        size = self.state.store.size
        pairs = torch.cat([torch.zeros(2, 0, dtype=torch.int64), *self.constraints.equal], 1).numpy()
        blocks = torch.cat([torch.zeros(2, 0, dtype=torch.int64), *self.constraints.blocks], 1).numpy()
        pins = np.zeros(size, np.int64)
        pins[list(self.pinned())] = 1
        solver = Solver(size, pairs, blocks, pins, [("", ""), ("pinned", "fixed")])
        kinds = np.zeros(solver.count, np.uint64)
        salt = np.random.default_rng(5)
        runs = [run for runs in self.fields for run in runs]
        runs += [run for t in self.outputs() for run in self.state.entry(t).fields]
        for run in runs:
            flat = run.reshape(-1).numpy()
            np.add.at(kinds, solver.klass[flat[flat > 0]], salt.integers(1, 2**62, dtype=np.uint64))
        for block, member in solver.edges.T:
            if solver.pinned[block]:
                kinds[member] += np.uint64(block * 1000003 + 17)
        kinds = kinds.view(np.int64)
        units, deep, tangles = units_of(solver, kinds)
        assert not deep
        assert not tangles
        rng = np.random.default_rng(seed)
        image = np.arange(solver.count)
        inside = {c for unit in units for c in unit.classes}
        singles = {}
        for c in range(solver.count):
            if c not in inside and not solver.pinned[c]:
                singles.setdefault(int(kinds[c]), []).append(c)
        for group in singles.values():
            image[group] = rng.permutation(group)
        families = {}
        for unit in units:
            families.setdefault((int(kinds[unit.root]), unit.kind), []).append(unit)
        for family in families.values():
            for unit, other in zip(family, rng.permutation(np.array(family, object)), strict=True):
                image[unit.root] = other.root
                for (_, here), (_, there) in zip(unit.members, other.members, strict=True):
                    image[list(here)] = rng.permutation(list(there))
        return solver.klass, image

    def moved(self, tensor, runs, klass, image):
        """The tensor with every element at the place where its labels went."""
        for axis in range(tensor.ndim):
            mine = [run for run in runs if varying(run) == {axis}]
            for run in mine:
                flat = run.reshape(-1).numpy()
                classes = np.where(flat > 0, klass[np.clip(flat, 0, None)], -1 - np.arange(len(flat)))
                goal = np.where(classes >= 0, image[np.clip(classes, 0, None)], classes)
                order = {}
                for place, c in enumerate(classes.tolist()):
                    order.setdefault(c, []).append(place)
                taken = dict.fromkeys(order, 0)
                target = np.empty(len(flat), np.int64)
                for place, c in enumerate(goal.tolist()):
                    target[place] = order[c][taken[c]]
                    taken[c] += 1
                tensor = torch.empty_like(tensor).index_copy_(axis, torch.from_numpy(target), tensor)
        return tensor

    def check(self, seed):
        klass, image = self.relabelling(seed)
        given = [self.moved(t, runs, klass, image) for t, runs in zip(self.tensors, self.fields, strict=True)]
        with torch.no_grad():
            found = self.call(*given)
        found = [found] if isinstance(found, Tensor) else [t for t in found if isinstance(t, Tensor)]
        moves = bool((image != np.arange(len(image))).any())
        for tensor, other in zip(self.outputs(), found, strict=True):
            runs = self.state.entry(tensor).fields
            if all(len(varying(run)) == 1 for run in runs):
                torch.testing.assert_close(other, self.moved(tensor, runs, klass, image), rtol=1e-10, atol=1e-12)
        return moves


def values(*shape):
    return torch.randn(*shape, dtype=torch.float64)


IDS = torch.tensor([3, 0, 0, 2])
aten = torch.ops.aten

# call, shapes, labelled axes of each operand, numbers of the static ones
CALLS = {
    "add": (torch.add, [(2, 6), (6,)], [(1,), (0,)], (1,)),
    "mul": (torch.mul, [(2, 6, 4), (6, 1)], [(1,), (0,)], (1,)),
    "where": (lambda a, b: torch.where(torch.tensor([[True], [False]]), a, b), [(2, 4), (2, 4)], [(1,), (1,)], ()),
    "glu": (torch.nn.functional.glu, [(3, 8)], [(1,)], ()),
    "relu": (torch.relu, [(2, 5)], [(1,)], ()),
    "sort in groups": (lambda x: x.view(2, 3, 4).sort(-1).values.flatten(1), [(2, 12)], [(1,)], ()),
    "cumsum in groups": (lambda x: x.view(2, 3, 4).cumsum(-1), [(2, 12)], [(1,)], ()),
    "clamp": (torch.clamp, [(2, 6), (6,), (6,)], [(1,), (0,), (0,)], (1, 2)),
    "tril": (torch.tril, [(5, 5)], [(0, 1)], ()),
    "triu of scores": (torch.triu, [(3, 4, 4)], [(0,)], ()),
    "mm": (torch.mm, [(3, 5), (5, 4)], [(1,), (0, 1)], (1,)),
    "mm_tokens": (lambda x, w: x @ w, [(2, 7, 5), (5, 4)], [(2,), (0, 1)], (1,)),
    "bmm": (torch.bmm, [(4, 3, 5), (4, 5, 6)], [(0, 2), (0, 1)], ()),
    "addmm": (torch.addmm, [(4,), (3, 5), (5, 4)], [(0,), (1,), (0, 1)], (0, 2)),
    "mv": (torch.mv, [(3, 5), (5,)], [(1,), (0,)], (1,)),
    "dot": (torch.dot, [(5,), (5,)], [(0,), (0,)], (1,)),
    "baddbmm": (torch.baddbmm, [(6,), (4, 3, 5), (4, 5, 6)], [(0,), (0, 2), (0, 1, 2)], (0, 2)),
    "convolution": (torch.conv2d, [(2, 4, 5, 5), (6, 4, 3, 3), (6,)], [(1,), (0, 1), (0,)], (1, 2)),
    "convolution_1d": (torch.conv1d, [(2, 4, 9), (6, 4, 3)], [(1,), (0, 1)], (1,)),
    "convolution_transposed": (torch.conv_transpose2d, [(2, 4, 5, 5), (4, 6, 3, 3)], [(1,), (0, 1)], (1,)),
    "convolution_of_places": (torch.conv1d, [(2, 3, 6), (4, 3, 1), (4,)], [(1, 2), (0, 1), (0,)], (1, 2)),
    "convolution_along_one_axis": (torch.conv2d, [(2, 3, 6, 5), (4, 3, 1, 3)], [(1, 2), (0, 1)], (1,)),
    "depthwise": (lambda x, w: torch.conv2d(x, w, groups=4), [(2, 4, 5, 5), (4, 1, 3, 3)], [(1,), (0,)], (1,)),
    "sum": (lambda x: x.sum(1), [(3, 5, 4)], [(1,)], ()),
    "mean": (lambda x: x.mean((0, 2)), [(3, 5, 4)], [(1,)], ()),
    "amax": (lambda x: x.amax(-1, True), [(3, 5)], [(1,)], ()),
    "var_mean": (lambda x: torch.var_mean(x, 0), [(3, 5)], [(1,)], ()),
    "linalg_vector_norm": (lambda x: torch.linalg.vector_norm(x, dim=0), [(3, 5)], [(1,)], ()),
    "argmax": (lambda x: x.argmax(1), [(3, 5)], [(1,)], ()),
    "cumsum": (lambda x: x.cumsum(1), [(3, 5)], [(1,)], ()),
    "cumsum_elsewhere": (lambda x: x.cumsum(0), [(3, 5)], [(1,)], ()),
    "topk": (lambda x: x.topk(2, 1), [(3, 5)], [(1,)], ()),
    "_softmax": (lambda x: x.softmax(1), [(3, 5)], [(1,)], ()),
    "native_layer_norm": (lambda x, w: torch.layer_norm(x, (5,), w), [(3, 5), (5,)], [(1,), (0,)], (1,)),
    "native_group_norm": (lambda x, w: torch.group_norm(x, 3, w), [(2, 6, 4), (6,)], [(1,), (0,)], (1,)),
    "native_batch_norm": (
        lambda x, m, v: torch.nn.functional.batch_norm(x, m, v.abs() + 1),
        [(2, 5, 3), (5,), (5,)],
        [(1,), (0,), (0,)],
        (1, 2),
    ),
    "max_pool2d_with_indices": (lambda x: aten.max_pool2d_with_indices(x, [2, 2]), [(2, 3, 4, 4)], [(1,)], ()),
    "avg_pool2d": (lambda x: torch.nn.functional.avg_pool2d(x, 2), [(2, 3, 4, 4)], [(1,)], ()),
    "_adaptive_avg_pool2d": (lambda x: aten._adaptive_avg_pool2d(x, [2, 2]), [(2, 3, 4, 4)], [(1,)], ()),
    "upsample_nearest2d": (lambda x: torch.nn.functional.interpolate(x, scale_factor=2), [(2, 3, 4, 4)], [(1,)], ()),
    "grid_sampler_2d": (
        lambda x: torch.nn.functional.grid_sample(x, torch.zeros(2, 2, 2, 2, dtype=x.dtype), align_corners=False),
        [(2, 3, 4, 4)],
        [(1,)],
        (),
    ),
    "im2col": (lambda x: torch.nn.functional.unfold(x, 2), [(2, 3, 4, 4)], [(1,)], ()),
    "col2im": (
        lambda x: torch.nn.functional.fold(torch.nn.functional.unfold(x, 2), (4, 4), 2),
        [(2, 3, 4, 4)],
        [(1,)],
        (),
    ),
    "view": (lambda x: x.reshape(2, 12), [(2, 3, 4)], [(1,)], ()),
    "permute": (lambda x: x.permute(2, 0, 1), [(2, 3, 4)], [(1,)], ()),
    "split": (lambda x: torch.cat(x.split([2, 3], 1)[::-1], 1), [(2, 5)], [(1,)], ()),
    "flip": (lambda x: x.flip(1), [(2, 5)], [(1,)], ()),
    "roll": (lambda x: x.roll(2, 1), [(2, 5)], [(1,)], ()),
    "expand": (lambda x: x[:, None].expand(5, 3, 2).reshape(5, 6), [(5, 2)], [(0,)], ()),
    "pixel_shuffle": (lambda x: torch.pixel_shuffle(x, 2), [(2, 12, 3, 3)], [(1,)], ()),
    "index": (lambda x: x[:, IDS], [(2, 5)], [(1,)], ()),
    "index_select": (lambda x: x.index_select(1, IDS), [(2, 5)], [(1,)], ()),
    "gather": (lambda x: x.gather(0, IDS[:, None].expand(4, 5) % 2), [(4, 5)], [(1,)], ()),
    "embedding": (lambda w: torch.nn.functional.embedding(IDS, w), [(5, 6)], [(0, 1)], (0,)),
    "constant_pad_nd": (lambda x: torch.nn.functional.pad(x, (1, 2)), [(2, 5)], [(1,)], ()),
    "cat": (lambda a, b: torch.cat([a, b], 1), [(2, 3), (2, 4)], [(1,), (1,)], ()),
    "cat_elsewhere": (lambda a, b: torch.cat([a, b], 0), [(2, 4), (3, 4)], [(1,), (1,)], ()),
    "stack": (lambda a, b: torch.stack([a, b], 0), [(2, 4), (2, 4)], [(1,), (1,)], ()),
    "index_add": (lambda x, y: x.index_add(0, IDS, y), [(5, 6), (4, 6)], [(1,), (1,)], ()),
    "scatter_add": (lambda x, y: x.scatter_add(0, IDS[:, None].expand(4, 6), y), [(5, 6), (4, 6)], [(1,), (1,)], ()),
    "index_put": (lambda x, y: x.index_put((IDS,), y), [(5, 6), (4, 6)], [(1,), (1,)], ()),
    "slice_scatter": (lambda x, y: torch.slice_scatter(x, y, 1, 2, 5), [(2, 6), (2, 3)], [(1,), (1,)], ()),
    "select_scatter": (lambda x, y: torch.select_scatter(x, y, 0, 1), [(3, 6), (6,)], [(1,), (0,)], ()),
    "copy": (lambda x, y: x.clone().copy_(y), [(3, 6), (6,)], [(1,), (0,)], ()),
}
IMMOVABLE = {"argmax", "cumsum", "topk", "flip", "roll", "tril"}


@pytest.mark.parametrize("name", CALLS)
def test_rules_against_values(name):
    call, shapes, axes, static = CALLS[name]
    torch.manual_seed(0)
    bench = Bench(call, [values(*shape) for shape in shapes], axes, static)
    assert not bench.state.barriers
    moves = [bench.check(seed) for seed in range(6)]
    assert any(moves) == (name not in IMMOVABLE)


def test_the_oracle_can_fail():
    """A test of the test: a rule that forgets the order is noticed."""
    bench = Bench(lambda x: x[:, torch.tensor([4, 2, 3, 0, 1])], [values(2, 5)], [(1,)])
    entry = bench.state.entry(bench.out)
    entry.fields = tuple(labels.flip(1) for labels in entry.fields)
    with pytest.raises(AssertionError):
        all(bench.check(seed) or True for seed in range(6))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_movement_on_labels_is_movement_on_values(data):
    """Run chains of moving calls on a tensor of numbers and on its labels: they stay in step."""
    state = State(RULES)
    shape = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=3))
    axis = data.draw(st.integers(0, len(shape) - 1))
    labels = along(state.store.fresh(shape[axis]), axis, len(shape))
    x = labels.expand(shape).double().contiguous()  # the values are the labels
    entry = state.entry(x)
    entry.fields, entry.static = (labels,), False
    state.entries[id(x)] = entry
    with LabelMode(state):
        for _ in range(data.draw(st.integers(1, 4))):
            x = data.draw(st.sampled_from(MOVES))(x)
    for run in state.entry(x).fields:
        assert torch.equal(run.expand(x.shape).double(), x)
    if not state.entry(x).fields:
        assert x.unique().numel() <= 1


MOVES = [
    lambda x: x.transpose(0, -1),
    lambda x: x.flatten(),
    lambda x: x.reshape(-1, 1),
    lambda x: x.flip(0),
    lambda x: x.roll(1, -1),
    lambda x: torch.cat([x, x], 0),
    lambda x: torch.stack([x, x], -1),
    lambda x: x.unsqueeze(0),
    lambda x: x.repeat_interleave(2, 0),
    lambda x: x[..., :2],
    lambda x: x.clone(),
]


REASONS = {
    "`convolution` mixes neighbouring places": (
        torch.conv2d, [(2, 4, 5, 5), (6, 4, 3, 3)], [(2,), (0, 1)]),
    "a kernel has places, not features": (torch.conv2d, [(2, 4, 5, 5), (6, 4, 3, 3)], [(1,), (0, 1, 2)]),
    "`argmax` depends on the order of features": (lambda x: x.argmax(1), [(3, 5)], [(1,)]),
    "`cumsum` depends on the order of features": (lambda x: x.cumsum(1), [(3, 5)], [(1,)]),
    "`native_group_norm` normalises over positions": (lambda x: torch.group_norm(x, 2), [(2, 6, 4)], [(2,)]),
    "`avg_pool2d` mixes neighbouring places": (
        lambda x: torch.nn.functional.avg_pool2d(x, 2), [(2, 3, 4, 4)], [(3,)]),
    "`im2col` mixes neighbouring places": (lambda x: torch.nn.functional.unfold(x, 2), [(2, 3, 4, 4)], [(2,)]),
    "`grid_sampler_2d` reads it as coordinates": (
        lambda x, g: torch.nn.functional.grid_sample(x, g, align_corners=False),
        [(2, 3, 4, 4), (2, 2, 2, 2)], [(), (1,)]),
    "`embedding` reads its rows by number": (lambda w: torch.nn.functional.embedding(IDS, w), [(5, 6)], [(0, 1)]),
    "`index_add` puts it at places by number": (lambda x, y: x.index_add(0, IDS, y), [(5, 6), (4, 6)], [(0,), (1,)]),
    "`cat` joins it with unlabelled values": (lambda a, b: torch.cat([a, b], 0), [(2, 4), (3, 4)], [(1,), ()]),
    "`add` meets it with values that carry no feature": (torch.add, [(2, 4), (2, 4)], [(1,), ()]),
    "`mm` meets it with values that carry no feature": (torch.mm, [(3, 5), (5, 4)], [(), (0, 1)]),
    "`index` picks it by indices that depend on the input": (
        lambda x, y: x[:, y.argmax(1)], [(2, 5), (3, 4)], [(1,), ()]),
    "`gather` takes it for a position": (lambda x, y: x.gather(0, (y > 0).long()), [(2, 5), (2, 5)], [(1,), (0,)]),
    "it is taken out alone": (lambda x: x[:, 0], [(3, 5)], [(1,)]),
    "`flip` depends on the order of features": (lambda x: x.flip(1), [(3, 5)], [(1,)]),
    "`roll` depends on the order of features": (lambda x: x.roll(1, 1), [(3, 5)], [(1,)]),
}  # fmt: skip


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_of_pins(reason):
    call, shapes, axes = REASONS[reason]
    bench = Bench(call, [values(*shape) for shape in shapes], axes)
    pins = {pin.reason: pin.kind for pin in bench.constraints.pins}
    (found,) = (text for text in pins if text.startswith(f"{reason} ("))
    assert re.fullmatch(r"(`\w+` [^()]+ \(|[^`][^()]+ \(`\w+`, )node `here`\)", found), found
    assert pins[found] == "fixed"


def test_the_example_of_the_documentation_prints_what_it_says(capsys):
    text = (Path(__file__).parents[2] / "docs" / "rules.md").read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    exec(compile(program, "rules.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    said = re.findall(r"^print.*\n# (.*)$", program, re.MULTILINE)
    assert len(printed) == len(said) == 3
    for line, expected in zip(printed, said, strict=True):
        assert re.fullmatch(re.escape(expected).replace(r"\.\.\.", ".*"), line)


def test_rules_that_call_the_store_by_its_former_name_still_work():
    def doubled(call):
        call.ledger.pin(call.operand(call.args[0]).fields[0], "for this test")
        return call.operand(call.args[0]).fields

    net, x = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)), torch.randn(3, 4)
    with pytest.warns(DeprecationWarning, match=r"`call\.ledger` is called `call\.store` now\."):
        found = fxzip.inspect(net, x, rules=RULES | {"relu": doubled})
    assert not found.spaces
