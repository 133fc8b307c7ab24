"""The further methods of matching: k-means, hierarchical clustering, MuDSC, C2M3; a method of a user's own."""

import dataclasses
import doctest
import importlib
import itertools
import re
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from models import randomise
from models.networks import Residual
from scipy.optimize import linprog
from test_matching import as_sets, features, observed, shuffle
from test_weight_matching import mlp, permutations, problem

import fxzip
from fxzip.analysis import relative_difference
from fxzip.matching import (
    ENTRIES,
    FIRST_CLASS,
    METHODS,
    Agglomerative,
    CycleConsistent,
    KMeans,
    Merge,
    Method,
    MuDSC,
    Permute,
    SpaceMethod,
    TaskVectorMethod,
    Transport,
    WeightMatching,
    Zip,
    resolve,
    similarity,
)
from fxzip.matching.moments import Moments, moments
from fxzip.matching.weights.cycle_consistent import gradients, objective
from fxzip.matching.weights.dual_space import as_moments, weight_cosines
from fxzip.matching.weights.weight_matching import agreement, match_weights

close = torch.testing.assert_close
CLUSTERINGS = [KMeans(), Agglomerative(), Agglomerative("complete"), Agglomerative("single")]


# k-means, hierarchical clustering


@pytest.mark.parametrize("method", CLUSTERINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_clusterings_recover_relabelled_twins(method, seed):
    (x,) = features(7, seed=seed)
    pi, sigma = shuffle(7, seed), shuffle(7, seed + 1)
    merge = method(moments([x, x[:, pi], x[:, sigma]]), 7)
    close(merge.assignment(1), pi)
    close(merge.assignment(2), sigma)
    assert merge.correlation == pytest.approx(1)


def partitions(n, size):
    """All assignments of n points to exactly `size` clusters, up to their names."""
    for labels in itertools.product(range(size), repeat=n):
        firsts = [labels.index(c) for c in range(size) if c in labels]
        if len(firsts) == size and firsts == sorted(firsts):
            yield torch.tensor(labels)


def spread(points, labels):
    """Σ |z - mean of its cluster|², of points [n, positions]."""
    return sum(float((points[labels == c] - points[labels == c].mean(0)).square().sum()) for c in labels.unique())


def standardised(x):
    x = x - x.mean(0)
    return (x / x.norm(dim=0)).T


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_ends_where_no_feature_is_nearer_to_another_centre_and_no_worse_than_it_began(seed):
    parts = features(3, 3, seed=seed)
    points = standardised(torch.cat(parts, 1))
    merge = KMeans()(moments(parts), 3)
    labels = merge.labels()
    centres = torch.stack([points[labels == c].mean(0) for c in range(3)])
    close(torch.cdist(points, centres).argmin(1), labels)
    began = torch.cat([torch.arange(3), (points[3:] @ points[:3].T).argmax(1)])
    assert spread(points, labels) <= spread(points, began) + 1e-12


def test_kmeans_finds_the_best_partition_where_clusters_are_apart():
    (x,), (noise,) = features(3), features(6, seed=4)
    parts = [x + 0.05 * noise[:, :3], x[:, [1, 2, 0]] + 0.05 * noise[:, 3:]]
    points = standardised(torch.cat(parts, 1))
    best = min(partitions(6, 3), key=lambda labels: spread(points, labels))
    assert as_sets(KMeans()(moments(parts), 3).labels().numpy()) == as_sets(best.numpy())


def test_kmeans_leaves_no_cluster_empty():
    x = torch.ones(20, 1).double() * torch.randn(20, 1, dtype=torch.double)
    merge = KMeans()(moments([torch.cat([x, x, x], 1), torch.cat([x, x, x], 1)]), 3)
    close(merge.merge @ merge.unmerge, torch.eye(3, dtype=torch.double))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("linkage", "alike_by"), [("average", np.mean), ("complete", np.min), ("single", np.max)])
def test_linkage_joins_the_two_clusters_that_are_most_alike(linkage, alike_by, seed):
    statistics = observed(5, 4, seed=seed)
    alike = similarity(statistics).numpy()
    clusters = [[i] for i in range(9)]
    while len(clusters) > 5:
        pairs = itertools.combinations(range(len(clusters)), 2)
        i, j = max(pairs, key=lambda pair: alike_by(alike[np.ix_(clusters[pair[0]], clusters[pair[1]])]))
        clusters[i] += clusters.pop(j)
    labels = Agglomerative(linkage)(statistics, 5).labels().numpy()
    assert as_sets(labels) == {frozenset(cluster) for cluster in clusters}


# MuDSC


@pytest.mark.parametrize("inner", [Permute(), Zip()], ids=str)
def test_mudsc_by_activations_alone_is_the_inner_method(inner):
    nets = [mlp(3, 6, 4, 2, seed=seed) for seed in (1, 2)]
    own = problem(*nets, sample=torch.randn(2, 3, dtype=torch.double))
    spaces = tuple(
        dataclasses.replace(space, moments=observed(*space.sizes, seed=s)) for s, space in enumerate(own.spaces)
    )
    own = dataclasses.replace(own, spaces=spaces)
    for merge, space in zip(MuDSC(balance=0.0, inner=inner).match(own), spaces, strict=True):
        close(merge.merge, inner(space.moments, space.sizes[0]).merge)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("balance", [0.3, 0.7, 1.0])
def test_mudsc_of_one_hidden_layer_is_the_best_of_all_assignments_of_six_features(seed, balance):
    a, b = mlp(3, 6, 2, seed=seed), mlp(3, 6, 2, seed=seed + 10)
    own = problem(a, b, sample=torch.randn(2, 3, dtype=torch.double))
    seen = observed(6, 6, seed=seed)
    own = dataclasses.replace(own, spaces=(dataclasses.replace(own.spaces[0], moments=seen),))
    rows = [torch.cat([net[0].weight.data, net[0].bias.data[:, None]], 1) for net in (a, b)]
    cosine = torch.nn.functional.normalize(rows[0]) @ torch.nn.functional.normalize(rows[1]).T
    mixed = balance * cosine + (1 - balance) * seen.correlation[:6, 6:]
    best = max(permutations(6), key=lambda order: float(mixed[torch.arange(6), order].sum()))
    (merge,) = MuDSC(balance).match(own)
    close(merge.assignment(1)[best], torch.arange(6))


@pytest.mark.parametrize("inner", [Permute(), Zip()], ids=str)
def test_mudsc_recovers_a_twin(inner):
    model, sample = randomise(Residual()), torch.randn(2, 3, 8, 8)
    data = [torch.randn(6, 3, 8, 8)]
    zipped = fxzip.compile_zip(
        model, fxzip.relabel(model, sample), sample, data=data, method=MuDSC(inner=inner), refit=None
    )
    for output in zipped(sample):
        assert relative_difference(model(sample), output) <= 1e-4


def test_weight_cosines_are_those_of_the_slices():
    a, b = mlp(3, 5, 2, seed=1), mlp(3, 5, 2, seed=2)
    own = problem(a, b, sample=torch.randn(2, 3, dtype=torch.double))
    rows = torch.cat([torch.cat([net[0].weight.data, net[0].bias.data[:, None]], 1) for net in (a, b)])
    close(weight_cosines(own, 0, WeightMatching().match(own)), torch.nn.functional.cosine_similarity(
        rows[:, None], rows[None], dim=2))  # fmt: skip
    close(as_moments(torch.eye(3), (2, 1)).correlation, torch.eye(3).double())


# C2M3


def test_gradients_are_the_derivatives_of_the_objective():
    nets = [mlp(3, 4, 5, 2, seed=seed) for seed in range(3)]
    own = problem(*nets, sample=torch.randn(2, 3, dtype=torch.double))
    generator = torch.Generator().manual_seed(0)
    relaxed = [
        {s: torch.rand(n, n, generator=generator, dtype=torch.double) for s, n in enumerate((4, 5))} for _ in range(3)
    ]
    found = gradients(own, own.weights, relaxed)
    for k, s in itertools.product(range(3), range(2)):
        for place in [(0, 0), (1, 3), (2, 1)]:
            moved = [dict(held) for held in relaxed]
            moved[k][s] = relaxed[k][s].clone()
            moved[k][s][place] += 1e-6
            slope = (objective(own.weights, moved) - objective(own.weights, relaxed)) / 1e-6
            assert float(found[k][s][place]) == pytest.approx(slope, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_c2m3_of_two_models_with_one_hidden_layer_is_the_best_of_all_assignments_of_six_features(seed):
    own = problem(mlp(3, 6, 2, seed=seed), mlp(3, 6, 2, seed=seed + 10), sample=torch.randn(2, 3, dtype=torch.double))
    (merge,) = CycleConsistent().match(own)
    (expected,) = WeightMatching().match(own)
    close(merge.merge, expected.merge)


def test_c2m3_is_consistent_round_cycles_and_does_not_depend_on_the_order_of_models():
    nets = [mlp(3, 5, 4, 2, seed=seed) for seed in range(3)]
    sample = torch.randn(2, 3, dtype=torch.double)
    method = CycleConsistent(start="identity")
    first, turned = (
        method._matchings(problem(*order, sample=sample)) for order in (nets, [nets[i] for i in (1, 2, 0)])
    )
    for s in range(2):
        close(first[0][s], torch.arange(len(first[0][s])))
        for k, other in ((1, 0), (2, 1), (0, 2)):  # place of model k's features by way of another first model
            close(turned[other][s], first[k][s][first[1][s].argsort()])


def test_c2m3_gains_over_the_models_as_they_are():
    nets = [mlp(3, 6, 5, 2, seed=seed) for seed in range(4)]
    own = problem(*nets, sample=torch.randn(2, 3, dtype=torch.double))
    found = CycleConsistent()._matchings(own)
    many = match_weights(own, WeightMatching())
    as_they_are = [{s: torch.arange(n) for s, n in enumerate((6, 5))} for _ in range(4)]
    assert agreement(own, found) > agreement(own, as_they_are)
    assert agreement(own, found) > 0.8 * agreement(own, many)


def test_c2m3_recovers_three_twins_without_data():
    model, sample = randomise(Residual()), torch.randn(2, 3, 8, 8)
    twins = [fxzip.relabel(model, sample, seed=seed, verify=False) for seed in (1, 2)]
    zipped = fxzip.compile_zip([model, *twins], sample, method="c2m3", verify=False)
    for output in zipped(sample):
        assert relative_difference(model(sample), output) <= 1e-4


# Optimal transport


@pytest.fixture
def _pot():
    pytest.importorskip("ot")


@pytest.mark.usefixtures("_pot")
@pytest.mark.parametrize("seed", range(4))
def test_transport_between_equal_widths_is_the_best_of_all_assignments_of_six_features(seed):
    statistics = observed(6, 6, seed=seed)
    cross = statistics.correlation[:6, 6:]
    best = max(permutations(6), key=lambda order: float(cross[torch.arange(6), order].sum()))
    merge = Transport()(statistics, 6)
    close(merge.assignment(1)[best], torch.arange(6))
    close(merge.merge, Permute()(statistics, 6).merge)
    assert merge.bijective(1)
    assert merge.correlation == pytest.approx(float(cross[torch.arange(6), best].mean()))


@pytest.mark.usefixtures("_pot")
@pytest.mark.parametrize("sizes", [(4, 6), (6, 4)])
def test_transport_between_different_widths_is_the_cheapest_coupling(sizes):
    statistics = observed(*sizes)
    n, m = sizes
    cost = (1 - statistics.correlation[:n, n:]).numpy()
    sums = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    masses = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    cheapest = linprog(cost.reshape(-1), A_eq=sums, b_eq=masses).fun
    merge = Transport()(statistics, n)
    coupling = merge.U(1).T / m
    close(coupling.sum(1), torch.full((n,), 1 / n).double())
    close(merge.M(1), n * coupling / 2)
    assert float((coupling * torch.from_numpy(cost)).sum()) == pytest.approx(cheapest)
    close(merge.merge.sum(1), torch.ones(n).double())
    close(merge.unmerge.sum(1), torch.ones(n + m).double())


@pytest.mark.usefixtures("_pot")
def test_transport_with_little_entropy_is_nearly_the_exact_one_and_with_much_it_spreads():
    (x,) = features(5)
    statistics = moments([x, x[:, shuffle(5)]])
    exact = Transport()(statistics, 5).U(1)
    close(Transport(entropy=0.01)(statistics, 5).U(1), exact, atol=1e-3, rtol=0)
    spread_out = Transport(entropy=100.0)(statistics, 5).U(1)
    close(spread_out, torch.full((5, 5), 0.2).double(), atol=0.01, rtol=0)


@pytest.mark.usefixtures("_pot")
def test_heads_read_features_that_are_spread_through_a_matrix():
    """Exact where the trunk is linear: both heads then see U x*, not U applied behind their own nonlinearity."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)

        def forward(self, x):
            return self.last(self.first(x).relu())

    nets, sample = [Net().double(), Net().double()], torch.randn(20, 3, dtype=torch.double)
    method = Transport(entropy=0.3)
    zipped = fxzip.compile_zip(*nets, sample, method=method, until="first", refit=None)
    merge = method(moments([net.first(sample).detach() for net in nets]), 5)
    inner = sum(merge.M(k) @ net.first(sample).detach().T for k, net in enumerate(nets)).T
    for k, (net, output) in enumerate(zip(nets, zipped(sample), strict=True)):
        close(output.detach(), net.last((inner @ merge.U(k).T).relu()).detach(), atol=1e-6, rtol=1e-6)
    assert zipped.report["mixed"] == zipped.report["unmerges"]
    names = ", ".join(f"`{name}`" for name in zipped.report["mixed"])
    assert f"unmerged by a matrix product: {names}" in str(zipped.report)
    assert "unmerged by a gather" not in str(zipped.report)


def test_transport_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(fxzip.InputError, match=r"needs the package POT, which is not installed. Install it with `pip"):
        Transport()(observed(3, 3), 3)


# A method of one's own, names and messages


@dataclasses.dataclass(frozen=True)
class First(SpaceMethod):
    """Keep the first model's features; those of the others are their nearest."""

    name: ClassVar[str] = "first"

    def __call__(self, moments: Moments, size: int) -> Merge:
        n = moments.sizes[0]
        nearest = similarity(moments)[:, :n].argmax(1)
        return Merge(torch.eye(n, sum(moments.sizes)).double(), torch.eye(n).double()[nearest], moments.sizes, 1.0)


def test_a_method_of_ones_own_by_name(monkeypatch):
    monkeypatch.setitem(METHODS, "first", First)
    model, other = (randomise(Residual(), seed) for seed in (0, 1))
    sample = torch.randn(2, 3, 8, 8)
    zipped = fxzip.compile_zip(model, other, sample, method="first", refit=None)
    assert relative_difference(model(sample), zipped(sample)[0]) <= 1e-5
    assert "First()" in zipped.report["method"]


@dataclasses.dataclass(frozen=True)
class Called:
    """A method as they were once written: with a call and a relabelling of its own, and no base class."""

    name: ClassVar[str] = "called"

    def __call__(self, moments: Moments, size: int) -> Merge:
        return Permute()(moments, size)

    def relabelling(self):
        return Permute()


@dataclasses.dataclass(frozen=True)
class Matching:
    """A method of all spaces without the base class."""

    def match(self, problem):
        return Permute().match(problem)


@pytest.mark.parametrize(("kind", "base"), [(Called, "SpaceMethod"), (Matching, "Method")])
def test_a_method_without_the_base_class_is_told_which(kind, base, monkeypatch):
    message = f"subclass of `fxzip.matching.{base}`, .*; found `{kind.__name__}`, .* `class {kind.__name__}"
    with pytest.raises(fxzip.OptionError, match=message):
        resolve(kind())
    monkeypatch.setitem(METHODS, "own", kind)
    with pytest.raises(fxzip.OptionError, match=message):
        resolve("own")

    whole = type(kind.__name__, (kind, SpaceMethod if base == "SpaceMethod" else Method), {})()
    assert resolve(whole) is whole
    assert (whole.needs, whole.relabelling(), whole.by_position) == ({"moments"}, Permute(), False)


def test_evidence_that_there_is_none_of_is_refused():
    asking = type("Asking", (Matching, Method), {"needs": frozenset({"moments", "readers"})})()
    with pytest.raises(
        fxzip.OptionError, match="names evidence, 'moments', 'weights', 'downstream'; found 'readers' in"
    ):
        resolve(asking)


def test_what_the_registry_says_of_a_method_is_so():
    for name, entry in ENTRIES.items():
        method = entry.method()
        assert (method.name, type(method).__name__ in entry.method.__name__) == (name, True)
        assert entry.paper
        assert re.fullmatch(r"|arXiv \d{4}\.\d{5}|doi:10\.\S+", entry.source)
        assert (method.relabelling() is method) == method.one_to_one or name in ("mudsc", "transport")
    assert FIRST_CLASS == ("energy", "zip", "permute", "weights", "average")
    assert tuple(ENTRIES)[: len(FIRST_CLASS)] == FIRST_CLASS


@pytest.mark.parametrize("name", [name for name in METHODS if not resolve(name).by_position])
def test_every_name_gives_a_network_back_that_is_zipped_with_its_relabelled_copy(name):
    if name == "transport":
        pytest.importorskip("ot")
    net, x = mlp(4, 8, 7, 3, seed=1), torch.randn(200, 4, dtype=torch.double)
    twin = fxzip.relabel(net, x, verify=False)
    zipped = fxzip.compile_zip(net, twin, x, data=[x], method=name, refit=None, verify=False, progress=False)
    for output in zipped(x):
        close(output.detach(), net(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", list(METHODS))
def test_every_name_zips(name):
    if name == "transport":
        pytest.importorskip("ot")
    model, other = (randomise(Residual(), seed) for seed in (0, 1))
    sample = torch.randn(4, 3, 8, 8)
    base = randomise(Residual(), 2) if issubclass(ENTRIES[name].method, TaskVectorMethod) else None
    zipped = fxzip.compile_zip(model, other, sample, data=[torch.randn(16, 3, 8, 8)], method=name, base=base)
    assert [tuple(y.shape) for y in zipped(sample)] == [(4, 4), (4, 4)]
    assert all(bool(y.isfinite().all()) for y in zipped(sample))
    assert resolve(name).relabelling() is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MuDSC(balance=2), "needs 0 <= balance <= 1, the weights' share; got balance=2"),
        (
            lambda: MuDSC(inner=WeightMatching()),
            r"`inner` must be a method that matches one space by its moments, such",
        ),
        (lambda: Agglomerative("ward"), "`linkage` must be one of 'average', 'complete', 'single'; got 'ward'"),
        (lambda: KMeans()(observed(3, 3), 7), "`kmeans` can keep 1 to 6 of the 6 features of this space; got `size` 7"),
        (lambda: Agglomerative()(observed(3, 3), 0), "`agglomerative` can keep 1 to 6 of the 6 features"),
        (lambda: Transport(entropy=-1), "`Transport` needs a finite entropy >= 0; got entropy=-1"),
        (lambda: Transport()(observed(3, 3), 4), "`transport` keeps the features of the first model: `size` must be 3"),
        (lambda: CycleConsistent(start="middle"), "`starts` must name one or more of"),
        (
            lambda: CycleConsistent().match(
                problem(mlp(3, 6, 2), mlp(3, 4, 2), sample=torch.randn(2, 3, dtype=torch.double))
            ),
            r"`c2m3` relabels models of equal widths; a space has \[6, 4\] features. Use `method=\"weights\"`",
        ),
    ],
)
def test_messages(call, message):
    with pytest.raises((fxzip.InputError, fxzip.OptionError), match=message):
        call()


@pytest.mark.parametrize("module", ["activations.clustering", "weights.dual_space", "weights.cycle_consistent"])
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module("fxzip.matching." + module), extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


def test_the_page_of_methods_names_them_all():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    for name in (*METHODS, *fxzip.REFITS):
        assert name is None or f'`"{name}"`' in page, name
