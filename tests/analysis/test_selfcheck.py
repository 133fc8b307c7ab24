"""The self-check: passes what is right, finds the culprit of what is wrong, names it, pins it or raises."""

import re
import warnings

import pytest
import torch
from models import randomise
from models.zoo import ZOO, Attention, Transformer, head, image, tokens
from torch import nn

from fxzip.analysis import label, relative_difference, self_check
from fxzip.analysis import random_trial as trial
from fxzip.analysis.rules import RULES
from fxzip.analysis.rules import elementwise as elementwise_rules
from fxzip.errors import PinnedSpaceWarning, RuleError, SelfCheckError
from fxzip.tracing import trace


class Concatenated(nn.Module):
    """Two branches concatenated, then scaled by fixed numbers; a third path that has nothing to do with them."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.other = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 9)
        self.head, self.tail = nn.Linear(8, 2), nn.Linear(9, 2)

    def forward(self, x):
        y = torch.cat([self.first(x), self.second(x)], -1)
        return self.head(torch.tanh(y)) + self.tail(torch.tanh(self.other(x)))


def wrong_cat(call):
    """A wrong rule: the features of the first operand twice."""
    parts = [call.operand(part) for part in call.args[0]]
    return tuple(torch.cat([labels] * len(parts), -1) for labels in parts[0].fields)


def blind(call):
    """A wrong rule: whatever meets, nothing is related."""
    return call.operands()[0].fields


def reversed_flip(call):
    """A wrong rule: the features stay where they were."""
    return call.operand(call.args[0]).fields


class Flipped(nn.Module):
    """A residual sum with a flipped copy: features may move in pairs only."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        y = self.first(x)
        return self.third(torch.relu(self.second(torch.tanh(y + y.flip(-1)))))


def labelled(model, sample, rules=RULES):
    return label(trace(model, sample), rules)


@pytest.mark.parametrize("name", ["mlp", "resnet_padded", "attention_packed", "two_by_two", "lstm"])
def test_right_rules_pass(name):
    model, sample = ZOO[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PinnedSpaceWarning)
        spaces, error, pinned = self_check(labelled(model, sample))
    assert error < 1e-12
    assert spaces.spaces
    assert not pinned


def test_culprit_is_named_and_pinned():
    labelling = labelled(Flipped(), tokens(), RULES | {"flip": reversed_flip})
    with pytest.warns(PinnedSpaceWarning) as caught:
        spaces, error, pinned = self_check(labelling)
    (message,) = {str(warning.message) for warning in caught if warning.category is PinnedSpaceWarning}
    assert re.fullmatch(
        r"The space of `first.weight` \(6 features\) failed the self-check: relabelling it moved the output by "
        r"[0-9.]+e-0\d\. Its features are pinned: they are not merged\.",
        message,
    )
    assert error < 1e-12
    assert [(space.name, space.size) for space in spaces.spaces] == [("second.weight", 5)]
    assert pinned
    assert all(reason.startswith("relabelling it moved the output by") for reason in pinned.values())


def test_only_the_culprits_are_pinned():
    with pytest.warns(PinnedSpaceWarning, match=r"`first\.weight` \(4 features\)") as caught:
        spaces, error, _ = self_check(labelled(Concatenated(), tokens(), RULES | {"cat": wrong_cat}))
    assert error < 1e-12
    assert all("other" not in str(warning.message) for warning in caught)
    assert ("other.weight", 9) in [(space.name, space.size) for space in spaces.spaces]


def test_small_effects_are_found():
    """A branch scaled by 1e-6 in the model: the check runs on parameters of its own."""

    class Quiet(Flipped):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.first.weight.mul_(1e-9)

    with pytest.warns(PinnedSpaceWarning, match="`first.weight`"):
        self_check(labelled(Quiet(), tokens(), RULES | {"flip": reversed_flip}))


class ScaledHeads(Attention):
    """Attention with a factor for each head."""

    def __init__(self):
        super().__init__("separate")
        self.temperature = nn.Parameter(torch.ones(self.heads, 1, 1))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (self.split(part(y), self.heads) for part in (self.q, self.k, self.v))
        z = torch.softmax((q @ k.transpose(-1, -2)) * self.temperature, -1) @ v
        return x + self.out(z.transpose(1, 2).flatten(2))


def test_tied_spaces_fail_together():
    labelling = labelled(Transformer(ScaledHeads()), tokens(), RULES | {"mul": blind})
    with pytest.warns(
        PinnedSpaceWarning, match=r"^The spaces of `block\.[qkv]\.weight` \(12 features\), `block\.[qkv]"
    ) as w:
        _, error, _ = self_check(labelling)
    assert "tied blockwise, failed the self-check" in str(w[0].message)
    assert error < 1e-12


def test_two_culprits_in_one_network():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            y = self.a(x)
            z = self.b(torch.tanh(y + y.flip(-1)))
            return self.c(torch.tanh(z + z.flip(-1)))

    with pytest.warns(PinnedSpaceWarning) as caught:
        spaces, error, _ = self_check(labelled(Two(), tokens(), RULES | {"flip": reversed_flip}))
    text = "\n".join(str(warning.message) for warning in caught)
    assert "`a.weight` (6 features)" in text
    assert "`b.weight` (5 features)" in text
    assert error < 1e-12
    assert not spaces.spaces


@pytest.mark.filterwarnings("ignore::fxzip.errors.PinnedSpaceWarning")
def test_what_pinning_does_not_cure_raises(monkeypatch):
    """When every relabelling is broken, the check must not end well."""
    monkeypatch.setattr(trial, "relabelled", lambda values, *_: {k: v * 1.5 for k, v in values.items()})
    labelling = labelled(Flipped(), tokens())
    with pytest.raises(
        SelfCheckError,
        match=r"^Relabelling free feature spaces must leave the output as it is; it moved by [0-9.]+e[+-]\d+ "
        r"\(relative\), and pinning the spaces at fault did not cure it\. Please report the model; `verify=False` "
        r"skips the check\.$",
    ):
        self_check(labelling)


def test_non_finite_on_random_parameters_falls_back_to_the_models_own():
    class Delicate(nn.Module):
        """Finite only for parameters of its own choosing."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 5, bias=False), nn.Linear(5, 2)
            self.scale = nn.Parameter(torch.tensor(-2.0))
            nn.init.constant_(self.first.weight, 0.01)

        def forward(self, x):
            return self.second(torch.relu(self.first(x))) + torch.sqrt(-self.scale)

    labelling = labelled(Delicate(), torch.randn(3, 4))
    spaces, error, pinned = self_check(labelling)
    assert error < 1e-12
    assert not pinned
    assert [space.size for space in spaces.spaces] == [5]


def test_integer_outputs_are_compared():
    class Chosen(Flipped):
        def forward(self, x):
            return super().forward(x).flatten(1).argmax(1), super().forward(x) > 0

    labelling = labelled(Chosen(), tokens(batch=2, length=200), RULES | {"flip": reversed_flip})
    with pytest.warns(PinnedSpaceWarning, match="`first.weight`"):
        self_check(labelling)
    assert self_check(labelled(Chosen(), tokens()))[1] == 0.0


def test_large_batches_are_cut_to_two(monkeypatch):
    sizes = []
    original = trial.run_with

    def spy(program, values, call, dtype, visit):
        sizes.append((call.args[0].shape[0], dtype))
        return original(program, values, call, dtype, visit)

    monkeypatch.setattr(trial, "run_with", spy)
    self_check(labelled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(64, 3)))
    assert sizes == [(2, torch.float64), (2, torch.float64)]


def test_the_dtype_may_be_chosen():
    """As for models that are too large for float64."""
    model, sample = ZOO["resnet"]()
    labelling = labelled(model, sample)
    _, error, pinned = self_check(labelling, dtype=torch.float32)
    assert 1e-12 < error < 1e-4
    assert not pinned
    with pytest.warns(PinnedSpaceWarning, match="`first.weight`"):
        self_check(labelled(Flipped(), tokens(), RULES | {"flip": reversed_flip}), dtype=torch.float32)


def test_a_call_that_insists_on_its_batch_and_dtype():
    """Batch size and dtype are the model's own where nothing else runs."""

    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.second(torch.ops.fxzip_tests.single(self.first(x)))

    spaces, error, _ = self_check(
        labelled(Stubborn(), torch.randn(6, 3), RULES | {"single": elementwise_rules.elementwise})
    )
    assert error < 1e-5
    assert [space.size for space in spaces.spaces] == [4]


@torch.library.custom_op("fxzip_tests::single", mutates_args=())
def single(x: torch.Tensor) -> torch.Tensor:
    """A call that takes float32 only."""
    if x.dtype != torch.float32:
        raise TypeError("float32 only")
    return torch.relu(x)


@single.register_fake
def _(x):
    return torch.empty_like(x)


def test_casts_do_not_hide_errors():
    """A model that computes in float32 whatever comes is checked in float64 all the same."""

    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            y = self.first(x).to(torch.float32)
            return self.second((y * torch.ones(4, dtype=torch.float32)).float())

    assert self_check(labelled(Casting(), torch.randn(2, 3)))[1] < 1e-14


def test_chaotic_networks_are_calmed():
    """Rounding alone must not count as an error: a deep recurrence that doubles angles."""

    class Chaos(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
            self.again = nn.Linear(6, 6)

        def forward(self, x):
            x = self.first(x)
            for _ in range(12):
                x = torch.sin(9 * self.again(x))
            return self.last(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error", PinnedSpaceWarning)
        spaces, error, _ = self_check(labelled(randomise(Chaos()), torch.randn(2, 3)))
    assert error < 1e-7
    assert [space.size for space in spaces.spaces] == [6]


@pytest.mark.parametrize(
    ("expected", "found", "gap"),
    [
        (torch.tensor([1.0, -2.0]), torch.tensor([1.0, -1.0]), 0.5),
        ({"a": [torch.tensor([1])]}, {"a": [torch.tensor([2])]}, float("inf")),
        ((torch.tensor([1]), torch.tensor([True])), (torch.tensor([1]), torch.tensor([True])), 0.0),
        (torch.tensor([3 + 4j]), torch.tensor([3 + 3j]), 0.2),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, float("inf")]), 0.0),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, -float("inf")]), float("inf")),
        (torch.tensor([1.0]), torch.tensor([float("nan")]), float("inf")),
        (torch.zeros(0), torch.zeros(0), 0.0),
        (None, None, 0.0),
    ],
)
def test_relative_difference(expected, found, gap):
    assert relative_difference(expected, found) == pytest.approx(gap)


def nothing(call):
    return ()


def unrelated_norm(call):
    return [call.operand(call.args[0]).fields, (), ()]


WRONG = {
    "cat": (wrong_cat, lambda: (Concatenated(), tokens())),
    "mul": (blind, ZOO["squeeze_excite"]),
    "add": (blind, ZOO["resnet"]),
    "view": (nothing, ZOO["view"]),
    "native_layer_norm": (unrelated_norm, ZOO["attention_packed"]),
    "bmm": (nothing, ZOO["attention_torch"]),
    "glu": (lambda call: tuple(labels.chunk(2, -1)[0] for labels in call.operands()[0].fields), ZOO["gated"]),
    "_softmax": (lambda call: (), ZOO["attention_separate"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_rule_broken_on_purpose_is_caught(name):
    """A test of the test."""
    rule, make = WRONG[name]
    model, sample = make()
    labelling = labelled(model, sample, RULES | {name: rule})
    try:
        with pytest.warns(PinnedSpaceWarning):
            _, error, _ = self_check(labelling)
        assert error < 1e-7
    except SelfCheckError:
        pass


def test_fields_of_the_wrong_shape():
    with pytest.raises(
        RuleError,
        match=r"^The rule of `tanh` must give fields with the axes of the result, each of size 1 or the result's, "
        r"\(2, 5, 8\); found \(1, 1, 3\) at node `tanh`",
    ):
        labelled(Concatenated(), tokens(), RULES | {"tanh": lambda call: (torch.ones(1, 1, 3, dtype=torch.int64),)})


def test_the_head_of_an_image_network_is_checked_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), head(4))
    assert [s.size for s in self_check(labelled(model, image()))[0].spaces] == [4]
