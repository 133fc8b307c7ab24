"""Random networks whose legal relabellings are known by construction, and the oracles on their zips."""

import random

import pytest
import torch

from fuzz.building import IDIOMS, Draw
from fuzz.minimise import minimise
from fuzz.oracles import ORACLES, Fault, FaultyAccount, difference, run, verified_counterpart
from fuzz.program import Program, build, inputs, random_program
from fuzz.spaces import Axis


@pytest.mark.parametrize("first", range(0, 120, 30))
def test_the_account_is_right(first):
    """Counterparts compute the same function; nothing of the package is asked."""
    moved = 0
    for seed in range(first, first + 30):
        program = random_program(seed)
        model = build(program, seed)
        twin = verified_counterpart(model, inputs(program, 16, seed), seed)
        moved += any(not torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert moved >= 24


def test_every_idiom_is_drawn_and_moves_unless_its_order_is_fixed():
    moved = set()
    for name in sorted(IDIOMS):
        for seed in range(40):
            kind = random.Random(seed).choice(IDIOMS[name].takes)
            program = Program(kind, ((("Conv" if kind == "image" else "Plain"), seed, ()), (name, seed, ())), -1)
            model = build(program, seed)
            twin = verified_counterpart(model, inputs(program, 8, seed), seed)
            first, last = model.blocks[0].parameters(), twin.blocks[0].parameters()
            if any(not torch.equal(a, b) for a, b in zip(first, last, strict=True)):
                moved.add(name)
                break
    assert set(IDIOMS) - moved == {"Fixed", "Learned", "Ordered"}


class Forgetful(Axis):
    """An axis that does not note that it is read in order."""

    def fix(self):
        pass


@pytest.mark.parametrize("name", ["Fixed", "Learned", "Ordered"])
def test_a_wrong_relabelling_is_caught(name, monkeypatch):
    """The test of the test: what fixes the order is left out of the account."""
    monkeypatch.setattr(Axis, "fix", Forgetful.fix)
    caught = 0
    for seed in range(10):
        image = IDIOMS[name].takes == ("image",)
        first = ("Conv" if image else "Plain", seed, ())
        program = Program("image" if image else "vector", (first, (name, seed, ())), -1)
        try:
            verified_counterpart(build(program, seed), inputs(program, 16, seed), seed)
        except FaultyAccount:
            caught += 1
    assert caught >= 8


def test_a_parameter_that_is_relabelled_on_one_side_only_is_caught(monkeypatch):
    monkeypatch.setattr(Draw, "linear", lambda self, i, o, bias=True, own=Draw.linear: own(self, Axis.fixed(i.size), o))
    program = Program("vector", (("Plain", 1, ()), ("Plain", 2, ())), -1)
    with pytest.raises(FaultyAccount, match="off by"):
        verified_counterpart(build(program, 0), inputs(program, 16, 0), 0)


def test_what_fails_is_made_smaller(monkeypatch):
    """A program that fails as long as it has a certain step is minimised to that step."""
    program = Program("vector", tuple((name, 3, ()) for name in ("Plain", "Linear", "Moved", "Plain", "Codes")), 5)
    fault = Fault("a", "b", "")
    monkeypatch.setattr(
        "fuzz.minimise.fails_alike", lambda p, seed, f: f if any(step[0] == "Moved" for step in p.steps) else None
    )
    small, _ = minimise(program, 0, fault)
    assert small == Program("vector", (("Moved", 3, ()),), -1)


def test_difference_sees_form_type_and_values():
    y = torch.ones(3)
    assert difference((y, y), (y, y)) == 0
    assert difference([y], (y,)) == float("inf")
    assert difference({"a": y}, {"a": y[:2]}) == float("inf")
    assert difference((), ()) == float("inf")
    assert difference(y * float("nan"), y) == float("inf")
    assert difference(y + 0.5, y) == pytest.approx(0.5)


def test_programs_are_data():
    program = random_program(11)
    assert eval(repr(program), {"Program": Program}) == program
    ours, theirs = build(program, 2).state_dict(), build(program, 2).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def sweep(seeds, each):
    """Some oracles of each seed in turn; what does not hold is shown with the command that makes it smaller."""
    faults, held, refused = [], 0, 0
    for seed in seeds:
        program = random_program(seed)
        found = run(program, seed, [ORACLES[(seed + turn) % len(ORACLES)] for turn in range(each)])
        faults += [f"python -m fuzz --first {seed} --count 1: {fault}" for fault in found.faults]
        held, refused = held + found.held.total(), refused + found.refused.total()
    assert not faults, "\n\n".join(faults)
    assert held >= refused if each > 1 else held, "where most is refused, nothing is tested"


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 100, 10))
def test_what_must_hold(first):
    """One oracle of each network, another one from network to network."""
    sweep(range(first, first + 10), 1)


@pytest.mark.slow
@pytest.mark.hours
@pytest.mark.parametrize("first", range(1000, 3000, 50))
def test_what_must_hold_of_many(first):
    sweep(range(first, first + 50), len(ORACLES))
