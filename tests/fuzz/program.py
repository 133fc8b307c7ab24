"""Random programs, and the networks that they stand for.

A program is plain data: the kind of its input and its steps, each `(idiom, seed, inner steps)`. The seed decides
everything within a step. So a program with a step less is again a program, and what fails can be made smaller.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import fixed, images, linear, special, structure, tokens  # noqa: F401  (each enters its idioms)
from .account import Account
from .building import IDIOMS, Draw, Stream
from .heads import Context, Head
from .spaces import Axis

Step = tuple[str, int, tuple[Any, ...]]


@dataclass(frozen=True)
class Program:
    """What a network is made of."""

    kind: str
    steps: tuple[Step, ...]
    head: int

    @property
    def smaller(self) -> list[Program]:
        """The programs with one step less, or with a step replaced by its inner steps; the smallest first."""
        plain = [replace(self, head=-1)] if self.head >= 0 else []
        return plain + [replace(self, steps=steps) for steps in _smaller(self.steps)]


def _smaller(steps: tuple[Step, ...]) -> list[tuple[Step, ...]]:
    found = []
    if len(steps) > 2:
        found += [steps[: len(steps) // 2], steps[len(steps) // 2 :]]
    for place, (name, seed, inner) in enumerate(steps):
        before, after = steps[:place], steps[place + 1 :]
        found.append((*before, *after))
        if inner:
            found.append((*before, *inner, *after))
            found += [(*before, (name, seed, less), *after) for less in _smaller(inner)]
    return found


KINDS = ["vector", "tokens", "tokens", "image", "image", "ids"]
CHANGES = {"Flat": "vector", "Patches": "tokens", "Pooled": "vector"}


def random_program(seed: int) -> Program:
    """A program of up to six steps."""
    rng = random.Random(seed)
    start = rng.choice(KINDS)
    kind, steps = "tokens" if start == "ids" else start, []
    for _ in range(rng.randint(1, 6)):
        steps.append(_step(rng, kind, 2))
        kind = CHANGES.get(steps[-1][0], kind)
    return Program(start, tuple(steps), rng.randrange(10**6))


def _step(rng: random.Random, kind: str, depth: int) -> Step:
    names = [name for name in sorted(IDIOMS) if kind in IDIOMS[name].takes and (depth == 2 or name not in CHANGES)]
    name = rng.choice(names)
    inner: tuple[Step, ...] = ()
    if IDIOMS[name].wraps and depth:
        inner = tuple(_step(rng, kind, depth - 1) for _ in range(rng.randint(0, 2)))
    return name, rng.randrange(10**6), inner


LENGTHS = {"vector": 1, "tokens": 5, "image": 4, "ids": 5}


class Network(nn.Module):
    """The network of a program. Steps that do not take what the step before gives are passed over."""

    def __init__(self, program: Program, classes: int) -> None:
        super().__init__()
        self.account = Account()
        draw = Draw(program.head, self.account)
        self.blocks, self.table = nn.ModuleList(), None
        start = stream = Stream(program.kind, Axis.fixed(5), LENGTHS[program.kind])
        axis = None
        if program.kind == "ids":
            axis = Axis.new(draw.width())
            self.table = nn.Embedding(11, axis.size)
            self.account.own(self.table.weight, 11, axis)
            stream = Stream("tokens", axis, 5)
        streams = []
        for name, seed, inner in program.steps:
            if stream.kind in IDIOMS[name].takes and stream.axis.size <= 40:
                block = IDIOMS[name](Draw(seed, self.account, inner), stream)
                self.blocks.append(block)
                stream = block.out
                streams.append(stream)
        self.head = Head(draw, stream, classes, Context(start, tuple(streams), axis), plain=program.head < 0)

    def forward(self, x: Tensor) -> Any:
        start = x
        if self.table is not None:
            x = self.table(x)
        hidden = []
        for block in self.blocks:
            x = block(x)
            hidden.append(x)
        return self.head(x, start, hidden, self.table)

    def counterpart(self, seed: int) -> nn.Module:
        """The same function with its features in another order."""
        return self.account.counterpart(self, seed)


def build(program: Program, seed: int = 0, classes: int = 3) -> Network:
    """The network of a program with random weights, in float64 and evaluation mode."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Network(program, classes).eval()
    finally:
        torch.set_default_dtype(before)


def inputs(program: Program, count: int, seed: int) -> Tensor:
    """Random inputs."""
    generator = torch.Generator().manual_seed(seed)
    if program.kind == "ids":
        return torch.randint(0, 11, (count, 5), generator=generator)
    shape = {"vector": (5,), "tokens": (5, 5), "image": (5, 4, 4)}[program.kind]
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64)
