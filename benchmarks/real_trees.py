"""Epidemics drawn at random, their trees, and the trees as PhyloDeep's networks read them: data with true labels.

Three models of an epidemic (Voznica et al. 2022, Nature Communications 13:3896), which differ in who infects whom:

    BD    everybody infectious infects at rate λ and is removed at rate γ
    BDEI  who is infected is not infectious at first, and becomes so at rate ε
    BDSS  a share f of all infected are superspreaders, who infect X times as often as the others

Whoever is removed is sampled with probability p, and an epidemic ends with the last sample wanted. The tree is that of
the samples. Parameters are drawn from the ranges that the networks were trained on (the paper's table 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TIPS = (200, 500)
"""Tips of the trees that PhyloDeep calls large, from and to."""
LONGEST = 2 * TIPS[1] - 1
LIMIT = 200_000
"""An epidemic of more infections is drawn again: it takes too long."""


@dataclass(frozen=True)
class Epidemic:
    """How an epidemic runs.

    Attributes:
        reproduction: R₀, infections by one person.
        infectious: mean days from becoming infectious to removal.
        sampling: the share of the removed that are sampled.
        incubation: mean days from infection to becoming infectious; 0: at once.
        spreading: how many times as often superspreaders infect.
        share: of superspreaders.
    """

    reproduction: float
    infectious: float
    sampling: float
    incubation: float = 0.0
    spreading: float = 1.0
    share: float = 0.0


def draw_bd(rng: np.random.Generator) -> Epidemic:
    return Epidemic(rng.uniform(1, 5), rng.uniform(1, 10), rng.uniform(0.01, 1))


def draw_bdei(rng: np.random.Generator) -> Epidemic:
    simple = draw_bd(rng)
    incubation = simple.infectious * rng.uniform(0.2, 5)
    return Epidemic(simple.reproduction, simple.infectious, simple.sampling, incubation)


def draw_bdss(rng: np.random.Generator) -> Epidemic:
    simple = draw_bd(rng)
    return Epidemic(
        simple.reproduction, simple.infectious, simple.sampling, 0.0, rng.uniform(3, 10), rng.uniform(0.05, 0.2)
    )


KINDS: dict[str, Callable[[np.random.Generator], Epidemic]] = {"BD": draw_bd, "BDEI": draw_bdei, "BDSS": draw_bdss}


@dataclass(frozen=True)
class Tree:
    """A binary tree in time.

    Attributes:
        time: of each node, from some start [N].
        children: of each node, (-1, -1) of a tip.
        root: the number of the node at the top.
    """

    time: np.ndarray
    children: list[tuple[int, int]]
    root: int


def simulate(epidemic: Epidemic, tips: int, rng: np.random.Generator) -> Tree | None:
    """The tree of the first `tips` samples of one epidemic; None if it dies out before, or grows past `LIMIT`.

    Persons are numbered in the order of their infection. There are always those who incubate, and those who are
    infectious, in two classes.
    """
    removal = 1 / epidemic.infectious
    onset = 1 / epidemic.incubation if epidemic.incubation else 0.0
    mean = epidemic.spreading * epidemic.share + 1 - epidemic.share
    slow = epidemic.reproduction * removal / mean
    rates = (slow, slow * epidemic.spreading)
    parent, born, died = [-1], [0.0], [-1.0]  # died: when sampled, or -1
    waiting: list[int] = []
    infectious: tuple[list[int], list[int]] = ([], [])
    (waiting if onset else infectious[int(rng.random() < epidemic.share)]).append(0)
    now, sampled = 0.0, 0
    while sampled < tips:
        infecting = [rate * len(group) for rate, group in zip(rates, infectious, strict=True)]
        leaving = removal * (len(infectious[0]) + len(infectious[1]))
        total = infecting[0] + infecting[1] + leaving + onset * len(waiting)
        if total == 0 or len(parent) > LIMIT:
            return None

        now += rng.exponential(1 / total)
        at = rng.random() * total
        if at < infecting[0] + infecting[1]:
            group = infectious[int(at >= infecting[0])]
            parent.append(group[int(rng.random() * len(group))])
            born.append(now)
            died.append(-1.0)
            (waiting if onset else infectious[int(rng.random() < epidemic.share)]).append(len(parent) - 1)
        elif at < infecting[0] + infecting[1] + leaving:
            place = int(rng.random() * (len(infectious[0]) + len(infectious[1])))
            group = infectious[0] if place < len(infectious[0]) else infectious[1]
            person = _taken(group, place if group is infectious[0] else place - len(infectious[0]))
            if rng.random() < epidemic.sampling:
                died[person] = now
                sampled += 1
        else:
            person = _taken(waiting, int(rng.random() * len(waiting)))
            infectious[int(rng.random() < epidemic.share)].append(person)
    return _tree_of_samples(parent, born, died)


def _taken(group: list[int], place: int) -> int:
    """The person at a place of a group, who leaves it; the order within a group does not matter."""
    group[place], group[-1] = group[-1], group[place]
    return group.pop()


def _tree_of_samples(parent: Sequence[int], born: Sequence[float], died: Sequence[float]) -> Tree:
    """What is left of who infected whom if only the samples are seen.

    Later infections come first: then all that a person passed on is known when the person is met, and it joins the
    line of who infected them, which at that time leads to what is later.
    """
    time: list[float] = []
    children: list[tuple[int, int]] = []
    line = [-1] * len(parent)  # the topmost node so far of what a person is, or passed on

    def add(at: float, below: tuple[int, int]) -> int:
        time.append(at)
        children.append(below)
        return len(time) - 1

    for person, end in enumerate(died):
        if end >= 0:
            line[person] = add(end, (-1, -1))
    for person in range(len(parent) - 1, 0, -1):
        source = parent[person]
        if line[person] < 0:
            continue
        line[source] = line[person] if line[source] < 0 else add(born[person], (line[source], line[person]))
    return Tree(np.array(time), children, line[0])


def encode(tree: Tree, sampling: float, length: int = LONGEST) -> tuple[np.ndarray, float]:
    """A tree as PhyloDeep's CNNs read it [length + 3], and the mean length of its branches.

    Times are in mean branches. Nodes come from left to right, at every branching the side with the latest tip first: of
    a tip its distance to the branching passed last, of a branching its distance to the root. All branchings are first,
    then all tips, with the sampling probability in each half, in the order of the package's `encode_into_most_recent`.
    """
    above = np.zeros(len(tree.time))
    for node, below in enumerate(tree.children):
        for child in below:
            if child >= 0:
                above[child] = tree.time[child] - tree.time[node]
    scale = float(above.mean())
    distance = (tree.time - tree.time[tree.root]) / scale
    deepest = distance.copy()
    for node in np.argsort(-tree.time):  # children are later than what they come from
        for child in tree.children[node]:
            if child >= 0:
                deepest[node] = max(deepest[node], deepest[child])

    values, passed = [], tree.root
    stack = [(tree.root, False)]
    while stack:
        node, opened = stack.pop()
        left, right = tree.children[node]
        if left < 0:
            values.append(distance[node] - distance[passed])
        elif opened:
            values.append(distance[node])
            passed = node
        else:
            first, second = (left, right) if deepest[left] >= deepest[right] else (right, left)
            stack += [(second, False), (node, True), (first, False)]
    padded = np.zeros(length + 3)
    padded[: len(values)] = values
    padded[length + 1 :] = sampling
    return padded[_order(length)], scale


def _order(length: int) -> np.ndarray:
    """Where `encode_into_most_recent` puts what; in both halves the sampling probability is the last but one."""
    tips = np.insert(np.arange(0, length, 2), -1, length + 1)
    branchings = np.insert(np.insert(np.arange(1, length - 1, 2), 0, length), -1, length + 2)
    return np.append(branchings, tips)


@dataclass(frozen=True, eq=False)
class Trees:
    """Encoded trees of one kind.

    Attributes:
        inputs: float32 [n, 1002].
        scale: days in a mean branch, of each tree [n].
        truth: by the names of PhyloDeep's outputs, in days where it is a time [n].
    """

    inputs: Tensor
    scale: Tensor
    truth: dict[str, Tensor]


def draw_trees(kind: str, count: int, seed: int) -> Trees:
    """Trees of one kind of epidemic, always the same for a seed."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    inputs, scales, drawn = [], [], []
    while len(inputs) < count:
        epidemic, tips = KINDS[kind](rng), int(rng.integers(TIPS[0], TIPS[1] + 1))
        for _ in range(100):  # an epidemic may die out at once; its parameters stay what was drawn
            tree = simulate(epidemic, tips, rng)
            if tree is not None:
                break
        else:
            continue
        values, scale = encode(tree, epidemic.sampling)
        inputs.append(values)
        scales.append(scale)
        drawn.append(epidemic)
    truth = {
        "R_naught": [one.reproduction for one in drawn],
        "Infectious_period": [one.infectious for one in drawn],
        "Incubation_period": [one.incubation for one in drawn],
        "X_transmission": [one.spreading for one in drawn],
        "Superspreading_individuals_fraction": [one.share for one in drawn],
    }
    return Trees(
        torch.tensor(np.stack(inputs), dtype=torch.float32),
        torch.tensor(scales, dtype=torch.float32),
        {name: torch.tensor(values, dtype=torch.float32) for name, values in truth.items()},
    )
