"""Wrong rules and wrong stages, planted one at a time: the self-check of a compile catches each of them."""

import warnings
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from models import randomise
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.analysis.rules import RULES
from fxzip.errors import FxzipError, PinnedSpaceWarning
from fxzip.matching import Merge

basis, plan, rewrite, soundness, trunk, entering = (
    import_module(f"fxzip.{name}")
    for name in (
        "rewriting.merged_parameters",
        "rewriting.zip_plan",
        "rewriting.emit",
        "compiler.soundness",
        "partition.trunk_search",
        "rewriting.emit_stems",
    )
)
OUTPUTS = {
    "logits": lambda y: y,
    "argmax": lambda y: y.argmax(-1),
    "sigmoid": lambda y: torch.sigmoid(40 * y),
    "one_hot": lambda y: F.one_hot(y.argmax(-1), 5),
}


class Net(nn.Module):
    """BatchNorm, a grouped kernel, halves that change places, a concatenation, a LayerNorm, an output."""

    def __init__(self, output="logits"):
        super().__init__()
        self.a, self.bn, self.g = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=2)
        self.b, self.c, self.norm = nn.Linear(8, 6), nn.Linear(8, 7), nn.LayerNorm(13)
        self.d, self.e, self.output = nn.Linear(13, 9), nn.Linear(9, 5), OUTPUTS[output]

    def forward(self, x):
        y = torch.relu(self.bn(self.a(x)))
        y = torch.tanh(self.g(y)).mean((2, 3))
        z = self.b(y)
        z = torch.tanh(z + torch.cat(z.chunk(2, -1)[::-1], -1))
        w = torch.sin(self.c(y))
        y = self.norm(torch.cat([z, w], -1))
        return self.output(self.e(torch.relu(self.d(y))))


class Written(nn.Module):
    """Writes into what it has computed before it goes on."""

    def __init__(self, output="logits"):
        super().__init__()
        self.a, self.b, self.c, self.output = nn.Linear(6, 8), nn.Linear(8, 9), nn.Linear(9, 5), OUTPUTS[output]

    def forward(self, x):
        y = torch.tanh(self.a(x))
        y.mul_(3.0)
        return self.output(self.c(torch.tanh(self.b(y) + 1)))


def rule(name, function):
    return lambda patch: RULES | {name: function}


def stage(module, name, made):
    """A stage replaced by what `made` makes of it."""

    def plant(patch):
        patch.setattr(module, name, made(getattr(module, name)))
        return RULES

    return plant


def by_position(right):
    return lambda names, values, *rest: torch.stack([v.double() for v in values]).mean(0).to(values[0].dtype)


def first_ones(*ends):
    """Parameters with such names as they are in the first model."""
    return lambda right: (
        lambda names, values, *rest: values[0] if names[0].endswith(ends) else right(names, values, *rest)
    )


def mean_of(*ends):
    return lambda right: (
        lambda names, values, *rest: (
            torch.stack(list(values)).mean(0) if names[0].endswith(ends) else right(names, values, *rest)
        )
    )


def rolled(right):
    def between(source, result, matrices):
        places = right(source, result, matrices)
        return basis.PlaceMap(places.rows, places.columns.roll(1), places.weights, places.height, places.width)

    return between


def transposed(right):
    """The merge matrix where the unmerge matrix belongs."""

    def share(value, name, target, change):
        odd = {s: Merge(m.merge, m.unmerge.flip(0), m.sizes, 1.0) for s, m in change.merges.items()}
        return right(value, name, target, replace(change, merges=odd))

    return share


def reversed_in_others(right):
    def pair_spaces(alignment, spaces):
        first, *others = right(alignment, spaces)
        order = range(len(first.spaces))[::-1]
        return (first, *(own.renumbered(order, replace(own, spaces=own.spaces[::-1])) for own in others))

    return pair_spaces


FAULTS = {
    "cat in the wrong order": rule(
        "cat",
        lambda call: (torch.cat([f for p in reversed(call.args[0]) for f in call.operand(p).fields], -1),),
    ),
    "two halves exchanged": rule(
        "split",
        lambda call: [tuple(f[..., part] for f in call.operand(call.args[0]).fields)
                      for part in (slice(3, None), slice(3))],
    ),
    "a norm that has nothing to do with its scale": rule(
        "native_layer_norm", lambda call: [call.operand(call.args[0]).fields, (), ()]
    ),
    "sums that are not related": rule("add", lambda call: call.operands()[0].fields),
    "a BatchNorm that has nothing to do with its tensors": rule(
        "native_batch_norm", lambda call: [call.operand(call.args[0]).fields, (), ()]
    ),
    "a ReLU that turns the features round": rule(
        "relu", lambda call: tuple(f.flip(1) for f in call.operands()[0].fields)
    ),
    "parameters averaged index by index": stage(basis, "merged_param", by_position),
    "the statistics of the first model": stage(basis, "merged_param", first_ones("running_mean", "running_var")),
    "the first model's weights": stage(basis, "merged_param", first_ones("a.weight")),
    "biases averaged index by index": stage(basis, "merged_param", mean_of("bias")),
    "places that are off by one": stage(basis.PlaceMap, "between", lambda right: staticmethod(rolled(right))),
    "the wrong unmerge matrix": stage(basis, "share", transposed),
    "groups in the wrong order": stage(basis, "_grouped", lambda right: lambda v, c: right(v, c).flip(0)),
    "heads of the first model": stage(rewrite, "head_module", lambda right: lambda p, k, *rest: right(p, 0, *rest)),
    "a head without its unmerge": stage(rewrite, "steps", lambda right: lambda *rest: []),
    "unmerges folded wherever": stage(plan, "unmerged_spaces", lambda right: lambda *rest: set()),
    "spaces of other models in another order": stage(trunk, "pair_spaces", reversed_in_others),
}  # fmt: skip
CUTS = {"a head without its unmerge": "tanh_1", "unmerges folded wherever": "b"}


def zipped_with_twin(model, x, plant, until=None, **options):
    """A zip of a model with its copy; the copy is made before the fault is planted."""
    twin = fxzip.relabel(model, x, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        rules = plant(patch)
        if hasattr(rewrite, "merged_param"):
            patch.setattr(rewrite, "merged_param", basis.merged_param)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            zipped = fxzip.compile_zip(
                model, twin, x[:4], data=[x], method="permute", until=until, refit=None, rules=rules, progress=False,
                **options,
            )  # fmt: skip
    return zipped, [w for w in caught if issubclass(w.category, PinnedSpaceWarning)]


def off(zipped, model, x):
    expected = model(x)
    return max(float((o.double() - expected.double()).abs().max()) for o in zipped(x))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_does_not_pass(fault, output):
    model, x = randomise(Net(output)).requires_grad_(False), torch.randn(64, 3, 6, 6)
    try:
        zipped, caught = zipped_with_twin(model, x, FAULTS[fault], CUTS.get(fault))
    except FxzipError:
        return
    assert caught or zipped.report["cut"]["unmatched"], "the fault was not noticed"
    assert off(zipped, model, x) < 1e-3


@pytest.mark.thinned(4)
@pytest.mark.parametrize("fault", [name for name in FAULTS if "spaces of other models" not in name])  # sizes differ
def test_what_is_planted_computes_something(fault):
    """A test of the test: unchecked, a network comes out, for what crashes by itself shows nothing of the check."""
    model, x = randomise(Net()).requires_grad_(False), torch.randn(64, 3, 6, 6)
    zipped, _ = zipped_with_twin(model, x, FAULTS[fault], CUTS.get(fault), verify=False)
    assert all(torch.isfinite(y).all() for y in zipped(x))


@pytest.mark.parametrize("output", ["logits", "argmax"])
def test_without_a_fault_nothing_is_said(output):
    model, x = randomise(Net(output)).requires_grad_(False), torch.randn(64, 3, 6, 6)
    for until in (None, "tanh_1", "b"):
        zipped, caught = zipped_with_twin(model, x, lambda patch: RULES, until)
        assert not caught
        assert off(zipped, model, x) < 1e-3


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_cut_that_leaves_out_a_write(monkeypatch, output):
    """The write in place goes missing from what is emitted."""
    model, x = randomise(Written(output)).requires_grad_(False), torch.randn(64, 6)
    right = rewrite.copied_node

    def forgetful(graph, node, prefix, env, part, writes):
        made = right(graph, node, prefix, env, part, writes)
        if node.name.startswith("mul"):
            made.args = (made.args[0], 1.0)
        return made

    def plant(patch):
        patch.setattr(rewrite, "copied_node", forgetful)
        return RULES

    with pytest.raises(FxzipError, match=r"a zip|A zip|share"):
        zipped_with_twin(model, x, plant)


def test_the_check_can_be_switched_off(monkeypatch):
    """A test of the test: what is caught above is wrong."""
    model, x = randomise(Net()).requires_grad_(False), torch.randn(64, 3, 6, 6)
    zipped, caught = zipped_with_twin(model, x, FAULTS["parameters averaged index by index"], verify=False)
    assert not caught
    assert off(zipped, model, x) > 0.01


def test_the_report_says_where_the_trunk_ends_and_why():
    model, x = randomise(Net()).requires_grad_(False), torch.randn(64, 3, 6, 6)
    zipped, caught = zipped_with_twin(model, x, stage(basis, "merged_param", mean_of("g.bias")))
    assert caught
    assert off(zipped, model, x) < 1e-3
    assert any("zip with a relabelled copy fails" in note for note in zipped.report["notes"])


@pytest.mark.parametrize("count", [2, 3])
def test_models_of_other_widths_are_zipped_with_themselves(count):
    nets = [nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 6), nn.ReLU(), nn.Linear(6, 3)) for n in (8, 10, 8)]
    found = import_module("fxzip.compiler.survey").survey(
        [randomise(net, k) for k, net in enumerate(nets[:count])],
        import_module("fxzip.tracing.calls").as_call(torch.randn(4, 4)),
    )
    assert soundness.couples(found.trunk()) == ([(0, 0), (1, 1)] if count == 2 else [(0, 2), (1, 1)])
    tried = found.sound(found.trunk())
    assert not tried.notes


def test_stems(monkeypatch):
    nets = [nn.Sequential(nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)) for n in (4, 4)]
    x = torch.randn(32, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PinnedSpaceWarning)
        fxzip.compile_zip(*(randomise(net, k) for k, net in enumerate(nets)), x, data=[x], start="1", progress=False)
    right = entering._entry_matrix

    def rolled_entry(*rest):
        rows, columns, weights, height = right(*rest)
        return rows, columns.roll(1), weights, height

    monkeypatch.setattr(entering, "_entry_matrix", rolled_entry)
    with pytest.raises(FxzipError):
        fxzip.compile_zip(*nets, x, data=[x], start="1", progress=False)
