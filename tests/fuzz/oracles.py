"""What must hold of a zip of any networks, whatever they are made of.

`run(program, seed)` makes the networks and a random setting for each oracle, and returns what does not hold. A refusal
(an error of the compiler's own) is no fault; any other exception is one.
"""

from __future__ import annotations

import copy
import io
import random
import re
import traceback
import warnings
from collections import Counter, UserDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any

import torch
from models import with_statistics_of
from torch import Tensor, nn

import fxzip
from fxzip.partition.node_names import cut_names

from .program import Program, build, inputs

EXACT, FITTED = 1e-7, 1e-4


class FaultyAccount(AssertionError):
    """The generator's own counterpart computes something else: the fault lies in the generator."""


@dataclass(frozen=True)
class Fault:
    """One thing that does not hold. `kind` is the same for faults of one kind, as far as can be told."""

    oracle: str
    kind: str
    setting: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.oracle}: {self.kind} with {self.setting}" + (f"\n{self.detail}" if self.detail else "")


@dataclass
class Found:
    """What a run of the oracles gave."""

    faults: list[Fault] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    held: Counter[str] = field(default_factory=Counter)


def leaves(value: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (dict, UserDict)):
        return [leaf for key in value for leaf in leaves(value[key])]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    if is_dataclass(value):
        return [leaf for own in fields(value) for leaf in leaves(getattr(value, own.name))]
    return []


def difference(found: Any, expected: Any) -> float:
    """The largest relative difference of two outputs; infinite where they have another form."""
    ours, theirs = leaves(found), leaves(expected)
    if type(found) is not type(expected) or [t.shape for t in ours] != [t.shape for t in theirs] or not theirs:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not (a.is_floating_point() and b.is_floating_point()):
            worst = max(worst, float((a != b).double().mean()))
            continue
        scale = b.abs().max().clamp(min=1e-6)
        worst = max(worst, float(((a - b).abs().max() / scale).nan_to_num(float("inf"))))
    return worst


def verified_counterpart(model: Any, x: Tensor, seed: int) -> nn.Module:
    """The generator's own counterpart of a network.

    Raises:
        FaultyAccount: it computes something else.
    """
    twin = model.counterpart(seed)
    with torch.no_grad():
        off = difference(twin(x), model(x))
    if not off < 1e-9:
        raise FaultyAccount(f"the counterpart is off by {off}")
    return twin


class Trial:
    """One network, its counterpart, another network, and data."""

    def __init__(self, program: Program, seed: int) -> None:
        self.program, self.rng = program, random.Random(seed)
        self.model = build(program, seed)
        self.x = inputs(program, 96, seed)
        self.other = build(program, seed + 10**6, classes=self.rng.choice([3, 3, 4]))
        self.twin = verified_counterpart(self.model, self.x, seed)
        with torch.no_grad():
            self.y, self.z = self.model(self.x), self.other(self.x)
        self.found = Found()

    def until(self) -> Any:
        """Nothing, a fraction, or the name of a node or module."""
        kind = self.rng.choice(["none", "none", "fraction", "name", "name"])
        if kind == "none":
            return None
        if kind == "fraction":
            return round(self.rng.uniform(0.05, 1), 3)
        return self.rng.choice(self.names)

    @cached_property
    def names(self) -> list[str]:
        """The nodes and modules at which the network may be cut."""
        return cut_names(list(fxzip.tracing.trace(self.model, self.x[:4]).module.graph.nodes))

    def compiled(self, oracle: str, a: nn.Module, b: nn.Module, check: Callable[[Any], str], **setting: Any) -> None:
        """Compile, check, and enter what comes of it; `check` returns what does not hold, or nothing."""
        said = ", ".join(f"{key}={value!r}" for key, value in setting.items()) or "the defaults"
        before = [copy.deepcopy(m.state_dict()) for m in (a, b)], torch.get_rng_state(), torch.get_default_dtype()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                zipped = fxzip.compile_zip(a, b, self.x[:4], data=[self.x[:48], self.x[48:]], progress=False, **setting)
                with torch.no_grad():
                    wrong = check(zipped)
            wrong = wrong or _side_effects(before, (a, b))
        except fxzip.FxzipError as refusal:
            self.found.refused[f"{type(refusal).__name__}: {_plain(str(refusal))}"] += 1
            if _unwind():
                self.found.faults.append(Fault(oracle, "the process is left inside vmap", said))
            return
        except FaultyAccount:
            raise
        except Exception as crash:
            self.found.faults.append(Fault(oracle, _crash(crash), said, traceback.format_exc(limit=-30)))
            _unwind()
            return
        if _unwind():
            wrong = "the process is left inside vmap"
        if wrong:
            self.found.faults.append(Fault(oracle, wrong.split("|")[0], said, wrong))
        else:
            self.found.held[oracle] += 1

    def equal(self, bound: float, *expected: Any) -> Callable[[Any], str]:
        def check(zipped: Any) -> str:
            found = zipped(self.x)
            off = [difference(own, wanted) for own, wanted in zip(found, expected, strict=True)]
            return "" if max(off) <= bound else f"wrong outputs| errors of the heads {[f'{e:.1e}' for e in off]}"

        return check


def _crash(crash: Exception) -> str:
    """What was raised, and in which function of the package."""
    where = [f for f in traceback.extract_tb(crash.__traceback__) if "fxzip" in f.filename][-1:]
    place = f"{where[0].filename.split('fxzip/')[-1]}:{where[0].name}" if where else "outside"
    return f"{type(crash).__name__} in {place}: {_plain(str(crash))}"


def _unwind() -> bool:
    """Leave transforms of torch.func that a failed compile left behind; whether there were any."""
    left = torch._C._functorch.peek_interpreter_stack() is not None
    if left:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(0)
    return left


def _plain(text: str) -> str:
    """A message without names, numbers and places."""
    text = re.sub(r"[`'][^`']*[`']", "_", text.splitlines()[0] if text else "")
    return re.sub(r"\d+", "0", text)[:90]


def _side_effects(before: Any, models: tuple[nn.Module, ...]) -> str:
    states, rng, dtype = before
    for state, model in zip(states, models, strict=True):
        now = model.state_dict()
        if state.keys() != now.keys() or not all(torch.equal(state[k], now[k]) for k in state):
            return "a network that was given has changed"
        if any(module.training for module in model.modules()) or any(p.grad is not None for p in model.parameters()):
            return "a network that was given has changed its mode"
    if not torch.equal(rng, torch.get_rng_state()):
        return "the random state has changed"
    return "" if dtype is torch.get_default_dtype() else "the default dtype has changed"


def counterpart_permuted(trial: Trial) -> None:
    """A network and its counterpart, matched by permutations, give that network at both heads."""
    setting = {"method": "permute", "refit": None, "until": trial.until()}
    trial.compiled("counterpart, permuted", trial.model, trial.twin, trial.equal(EXACT, trial.y, trial.y), **setting)


def counterpart_default(trial: Trial) -> None:
    """So they do under default settings, as far as least squares allows."""
    until = trial.until()
    trial.compiled("counterpart, default", trial.model, trial.twin, trial.equal(FITTED, trial.y, trial.y), until=until)


def with_itself(trial: Trial) -> None:
    """A network zipped with itself is itself, under every setting; with new statistics, it with new statistics."""
    setting = {
        "method": trial.rng.choice(["zip", "permute", "average", "weights"]),
        "refit": trial.rng.choice([None, "lstsq", "repair", "batchnorm"]),
        "until": trial.until(),
    }
    exact, y = setting["refit"] is None, trial.y
    if setting["refit"] == "batchnorm":
        setting["hold_out"] = False
        with torch.no_grad():
            y = with_statistics_of(trial.model, [trial.x[:48], trial.x[48:]])(trial.x)
    check = trial.equal(EXACT if exact else FITTED, y, y)
    trial.compiled("with itself", trial.model, trial.model, check, **setting)


def side_by_side(trial: Trial) -> None:
    """At twice the width two networks fit side by side: both are what they were, unless a space kept its size."""

    def check(zipped: Any) -> str:
        report = zipped.report
        if any(space["kept"] < 2 * space["size"] for space in report["spaces"]) or report["notes"]:
            return ""
        return trial.equal(EXACT, trial.y, trial.z)(zipped)

    until = trial.rng.choice([None, trial.rng.uniform(0.05, 1)])  # a name may ask for more than what is sound
    setting = {"method": "zip", "refit": None, "width": 2, "until": until}
    trial.compiled("side by side", trial.model, trial.other, check, **setting)


def heads_are_distinct(trial: Trial) -> None:
    """Two networks that differ stay two: their heads do not give one and the same."""

    def check(zipped: Any) -> str:
        first, second = zipped(trial.x)
        same = difference(first, second) < 1e-12
        return "heads that are one" if same and difference(trial.y, trial.z) > 1e-3 else ""

    trial.compiled("distinct heads", trial.model, trial.other, check, **trial.rng.choice([{}, {"refit": "repair"}]))


def _trains(model: nn.Module, x: Tensor, *, raising: bool = False) -> bool:
    """Whether a copy of a network runs in training mode, backwards too."""
    training = copy.deepcopy(model).train()
    try:
        with torch.enable_grad():
            floating = [leaf for leaf in leaves(training(x)) if leaf.is_floating_point() and leaf.requires_grad]
            sum((leaf.sum() for leaf in floating), torch.zeros(())).backward() if floating else None
    except RuntimeError:
        if raising:
            raise
        return False
    return True


def like_any_network(trial: Trial) -> None:
    """A zip is copied, saved and trained like any network."""

    def check(zipped: Any) -> str:
        y = zipped(trial.x)
        if difference(copy.deepcopy(zipped)(trial.x), y) != 0:
            return "a deep copy gives other bits"
        file = io.BytesIO()
        torch.save(zipped, file)
        file.seek(0)
        if difference(torch.load(file, weights_only=False)(trial.x), y) != 0:
            return "a loaded zip gives other bits"
        if _trains(trial.model, trial.x):
            assert _trains(zipped, trial.x, raising=True)
        return "" if str(zipped.report) else "no report"

    trial.compiled("like any network", trial.model, trial.other, check, until=trial.until())


BY_NAME = {
    "counterpart, permuted": counterpart_permuted,
    "counterpart, default": counterpart_default,
    "with itself": with_itself,
    "side by side": side_by_side,
    "distinct heads": heads_are_distinct,
    "like any network": like_any_network,
}


def _name(oracle: Callable[[Trial], None]) -> str:
    return next(name for name, own in BY_NAME.items() if own is oracle)


ORACLES = tuple(BY_NAME.values())


def run(program: Program, seed: int, oracles: Sequence[Callable[[Trial], None]] = ORACLES) -> Found:
    """All oracles on the networks of a program."""
    trial = Trial(program, seed)
    for oracle in oracles:
        trial.rng = random.Random(seed * 31 + ORACLES.index(oracle))
        try:
            oracle(trial)
        except fxzip.FxzipError as refusal:  # while a cut was chosen
            trial.found.refused[f"{type(refusal).__name__}: {_plain(str(refusal))}"] += 1
        except FaultyAccount:
            raise
        except Exception as crash:
            trial.found.faults.append(
                Fault(_name(oracle), _crash(crash), "tracing alone", traceback.format_exc(limit=-30))
            )
        _unwind()
    return trial.found
