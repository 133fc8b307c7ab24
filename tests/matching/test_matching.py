"""Matching: identities of the merge matrices, the greedy loop against the textbook's, assignments by brute force."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import itertools
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxzip.errors import DataError, InputError, OptionError
from fxzip.matching import METHODS, Average, BlockMoments, Merge, Permute, Zip, match_blocks, resolve, similarity
from fxzip.matching.activations.zipit import zip_clusters
from fxzip.matching.clusters import in_first_layout
from fxzip.matching.moments import Moments, moments
from fxzip.matching.similarities import mean_similarity

close = torch.testing.assert_close
SEEDS = st.integers(0, 10_000)
ALPHAS = st.sampled_from([1.0, 0.7, 0.3, 0.1])
BETAS = st.sampled_from([1.0, 0.5, 0.125, 0.0])
ALONE = [name for name, method in METHODS.items() if callable(method())]  # methods that see one space at a time


def features(*sizes: int, seed: int = 0, positions: int = 60) -> list[torch.Tensor]:
    """Correlated features of several models: noisy mixtures of the same few signals, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(positions, 5, generator=generator, dtype=torch.float64)
    return [
        signal @ torch.randn(5, n, generator=generator, dtype=torch.float64)
        + 0.8 * torch.randn(positions, n, generator=generator, dtype=torch.float64)
        + 3
        for n in sizes
    ]


def observed(*sizes: int, seed: int = 0) -> Moments:
    return moments(features(*sizes, seed=seed))


def shuffle(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def symmetric(matrix: torch.Tensor) -> torch.Tensor:
    """Rounding leaves moments short of symmetric."""
    return matrix.triu() + matrix.triu(1).T


def textbook_zip(
    alike: np.ndarray, sizes: tuple[int, ...], size: int, alpha: float, beta: float
) -> tuple[list[list[int]], int]:
    """The greedy loop as the paper has it: the maximum of all of S, again and again. And the merges it missed."""
    S, clusters = alike.copy(), [[i] for i in range(len(alike))]
    origin = np.repeat(np.arange(len(sizes)), sizes)
    np.fill_diagonal(S, -np.inf)
    budget = [int((len(S) - size) // len(sizes) * beta + 1e-4)] * len(sizes)

    def forbid(model: int) -> None:
        S[np.ix_(origin == model, origin == model)] = -np.inf

    for model in range(len(sizes)):
        if budget[model] == 0:
            forbid(model)
    while len(clusters) > size:
        i, j = sorted(np.unravel_index(S.argmax(), S.shape))
        if S.max() == -np.inf:
            break
        S[i] = alpha * np.minimum(S[i], S[j])
        S[:, i] = S[i]
        within = origin[i] == origin[j]
        S = np.delete(np.delete(S, j, 0), j, 1)
        model, origin = origin[i], np.delete(origin, j)
        clusters[i] += clusters.pop(j)
        if within:
            budget[model] -= 1
            if budget[model] <= 0:
                forbid(model)
    return clusters, len(clusters) - size


def as_sets(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}


# The merge itself


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 4), SEEDS)
def test_a_merge_of_clusters_averages_and_copies_back(n_0: int, n_1: int, n_2: int, seed: int) -> None:
    sizes, total = (n_0, n_1, n_2), n_0 + n_1 + n_2
    generator = torch.Generator().manual_seed(seed)
    m = int(torch.randint(1, total + 1, (1,), generator=generator))
    labels = torch.cat([torch.arange(m), torch.randint(0, m, (total - m,), generator=generator)])
    labels = labels[torch.randperm(total, generator=generator)]
    merge = Merge.from_clusters(labels, sizes)
    close(merge.merge @ merge.unmerge, torch.eye(m, dtype=torch.float64))
    close(merge.merge.sum(1), torch.ones(m, dtype=torch.float64))
    close(merge.merge, torch.linalg.pinv(merge.unmerge))
    parts = [merge.assignment(k) for k in range(3)]
    close(torch.cat([part for part in parts if part is not None]), labels)
    close(torch.cat([merge.M(k) for k in range(3)], 1), merge.merge)
    close(torch.cat([merge.U(k) for k in range(3)]), merge.unmerge)


def test_identity_is_the_mean_of_the_models() -> None:
    merge = Merge.identity(3, models=4)
    for k in range(4):
        close(merge.M(k), torch.eye(3, dtype=torch.float64) / 4)
        assert merge.bijective(k)
    assert merge.correlation == 1.0


def test_an_unmerge_that_mixes_features_has_no_assignment() -> None:
    mixed = torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    merge = Merge(torch.eye(2, dtype=torch.float64), mixed, (1, 1), 1.0)
    assert merge.assignment(0) is None
    assert not merge.bijective(0)
    assert merge.labels() is None
    close(merge.assignment(1), torch.tensor([1]))


def test_a_merge_into_fewer_slots_is_no_bijection() -> None:
    merge = Merge.from_clusters(torch.tensor([0, 1, 2, 0, 1]), sizes=(3, 2))
    assert merge.bijective(0)
    assert not merge.bijective(1)


def test_correlation_of_a_merge_is_the_mean_over_its_clusters() -> None:
    alike = torch.tensor([[1, 0.1, 0.2, 0.3], [0.1, 1, 0.4, 0.5], [0.2, 0.4, 1, 0.6], [0.3, 0.5, 0.6, 1]])
    assert mean_similarity(torch.tensor([0, 0, 0, 1]), alike) == pytest.approx((0.1 + 0.2 + 0.4) / 3)
    assert mean_similarity(torch.tensor([0, 1, 1, 0]), alike) == pytest.approx((0.3 + 0.4) / 2)
    assert mean_similarity(torch.tensor([0, 1, 2, 3]), alike) == 1.0


def test_merged_features_keep_the_layout_of_the_first_model() -> None:
    # Model 0 has features 0-2. The cluster of 1 and 2 takes slot 1; that of 3 alone fills slot 2.
    close(in_first_layout(torch.tensor([5, 9, 9, 0, 5]), (3, 2)), torch.tensor([0, 1, 1, 2, 0]))
    # Three slots for a first model of four: feature 3 has no slot of its own.
    close(in_first_layout(torch.tensor([0, 0, 2, 3, 3]), (4, 1)), torch.tensor([0, 0, 2, 1, 1]))
    # More slots than the first model has features.
    close(in_first_layout(torch.tensor([1, 2, 3, 2]), (1, 3)), torch.tensor([0, 1, 2, 1]))


# Similarity


def test_equal_constants_of_two_models_are_alike_and_no_others() -> None:
    x, y = features(3, 3)
    x[:, 0], x[:, 1], y[:, 0], y[:, 1] = 0.0, 5.0, 5.0, 0.0
    alike = similarity(moments([x, y]))
    close(alike[0, 4], torch.tensor(1.0, dtype=torch.float64))
    close(alike[1, 3], torch.tensor(1.0, dtype=torch.float64))
    close(alike[0, [1, 2, 3, 5]], torch.zeros(4, dtype=torch.float64))
    close(alike, alike.T)
    close(alike[2, 5], torch.corrcoef(torch.stack([x[:, 2], y[:, 2]]))[0, 1])


def test_constants_find_each_other_before_what_is_nearly_a_copy_does() -> None:
    """A feature that is twice another of its own model is less like that than two silent ones are alike."""
    (x,) = features(6)
    x[:, 1], x[:, 4] = 2 * x[:, 0], 0.0
    found = moments([x, x])
    found = dataclasses.replace(found, samples=torch.cat([x, x], 1)[:20])
    alike = similarity(found)
    assert float(alike[4, 10]) > float(alike[0, 1])
    close(Zip()(found, 6).assignment(1), torch.arange(6))


def test_one_position_is_enough_to_match_by_value() -> None:
    x = torch.tensor([[1.0, 2.0, -3.0]])
    for method in (Permute(), Zip()):
        close(method(moments([x, x[:, [2, 0, 1]]]), 3).assignment(1), torch.tensor([2, 0, 1]))


# All methods


@pytest.mark.parametrize("name", ["zip", "permute"])
@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 12), seed=SEEDS)
def test_a_relabelled_twin_is_recovered(name: str, n: int, seed: int) -> None:
    (x,) = features(n, seed=seed)
    pi, sigma = shuffle(n, seed), shuffle(n, seed + 1)
    merge = resolve(name)(moments([x, x[:, pi], x[:, sigma]]), n)
    close(merge.assignment(0), torch.arange(n))
    close(merge.assignment(1), pi)
    close(merge.assignment(2), sigma)
    assert merge.correlation == pytest.approx(1)


@pytest.mark.parametrize("name", ["zip", "permute"])
def test_a_twin_with_dead_features_is_recovered(name: str) -> None:
    (x,) = features(8)
    x[:, [1, 4, 6]] = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    pi = shuffle(8)
    merge = resolve(name)(moments([x, x[:, pi]]), 8)
    close(merge.assignment(1), pi)
    assert merge.correlation == pytest.approx(1)


def test_a_near_miss_is_not_taken_for_a_twin() -> None:
    """A test of the tests above: trade one feature of the twin for noise, and it must show."""
    (x,), (noise,) = features(8), features(8, seed=9)
    y = x[:, shuffle(8)]
    y[:, 0] = noise[:, 0]
    for method in (Zip(), Permute()):
        assert method(moments([x, y]), 8).correlation < 0.99


@pytest.mark.parametrize("method", [Zip(), Zip(0.3, 0.125), Zip(0.1, 0.0), Permute()], ids=str)
@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3), seed=SEEDS, data=st.data())
def test_relabelling_a_model_relabels_its_columns(method, sizes: list[int], seed: int, data: st.DataObject) -> None:
    x = features(*sizes, seed=seed)
    k = data.draw(st.integers(0, len(sizes) - 1))
    pi = shuffle(sizes[k], seed)
    before = method(moments(x), sizes[0])
    after = method(moments([*x[:k], x[k][:, pi], *x[k + 1 :]]), sizes[0])
    # Model 0 lends its layout: relabel its features, and whatever layout comes out, the clusters are the same.
    clusters = {tuple(row) for row in (before.merge > 0).tolist()}
    columns = torch.arange(sum(sizes))
    start = sum(sizes[:k])
    columns[start : start + sizes[k]] = columns[start : start + sizes[k]][pi]
    relabelled = after.merge.new_zeros(after.merge.shape)
    relabelled[:, columns] = after.merge
    assert {tuple(row) for row in (relabelled > 0).tolist()} == clusters
    if k > 0:
        mine = before.M(0).sum(1) > 0  # slots of clusters without a feature of model 0 are filled in model k's order
        close(after.M(k)[mine], before.M(k)[mine][:, pi])
        close(after.U(k)[:, mine], before.U(k)[pi][:, mine])
    close(before.merge.sum(1), torch.ones(sizes[0], dtype=torch.float64))
    close(before.merge @ before.unmerge, torch.eye(sizes[0], dtype=torch.float64))


@pytest.mark.parametrize("method", [Zip(0.3, 0.125), Zip(), Permute(), Average()], ids=str)
def test_dead_features_break_nothing(method) -> None:
    x, y = features(6, 6)
    x[:, :3] = 0
    y[:, 2:] = 7
    merge = method(moments([x, y]), 6)
    assert merge.merge.isfinite().all()
    close(merge.merge @ merge.unmerge, torch.eye(6, dtype=torch.float64))
    assert -1 <= merge.correlation <= 1


def test_a_model_alone_stays_as_it_is() -> None:
    for name in ALONE:
        close(resolve(name)(observed(4), 4).merge, torch.eye(4, dtype=torch.float64))


# Zip


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    alpha=ALPHAS,
    beta=BETAS,
    seed=SEEDS,
    grid=st.sampled_from([0, 1, 3]),
    data=st.data(),
)
def test_zip_is_the_textbook_loop(
    sizes: tuple[int, ...], alpha: float, beta: float, seed: int, grid: int, data
) -> None:
    """Also where the similarities, rounded to a grid, are full of ties."""
    alike = symmetric(similarity(observed(*sizes, seed=seed)))
    alike = (alike * grid).round() / grid if grid else alike
    size = data.draw(st.integers(1, sum(sizes)))
    clusters, missed = textbook_zip(alike.numpy(), sizes, size, alpha, beta)
    labels = zip_clusters(alike.numpy(), sizes, size, alpha, beta)
    if missed == 0:
        assert as_sets(labels) == {frozenset(cluster) for cluster in clusters}
    else:  # the budget is lifted, on top of the same clusters
        for cluster in clusters:
            assert len(set(labels[cluster])) == 1
    assert len(set(labels)) == size


@pytest.mark.parametrize("sizes", [(96, 96), (64, 64, 64), (100, 50)])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.3, 0.125), (0.1, 0.5), (1.0, 0.0)])
def test_zip_is_the_textbook_loop_in_the_large(sizes: tuple[int, ...], alpha: float, beta: float) -> None:
    alike = symmetric(similarity(observed(*sizes))).numpy()
    size = max(sizes)
    if beta == 0 and len(sizes) > 2:  # without merges within models, three greedy ones get stuck early
        size *= 2
    clusters, missed = textbook_zip(alike, sizes, size, alpha, beta)
    assert missed == 0
    assert as_sets(zip_clusters(alike, sizes, size, alpha, beta)) == {frozenset(cluster) for cluster in clusters}


def test_the_textbook_loop_tells_methods_apart() -> None:
    """A test of the test: other settings give other clusters, so the equalities above are not empty."""
    alike = symmetric(similarity(observed(24, 24))).numpy()
    results = [as_sets(zip_clusters(alike, (24, 24), 24, a, b)) for a, b in [(1, 1), (0.1, 1), (1, 0.25)]]
    assert all(x != y for x, y in itertools.combinations(results, 2))


def test_ties_go_to_the_first_pair() -> None:
    alike = np.full((4, 4), 0.5)
    np.testing.assert_array_equal(zip_clusters(alike, (4,), 3, 1.0, 1.0), [0, 0, 2, 3])
    np.testing.assert_array_equal(zip_clusters(alike, (2, 2), 3, 1.0, 0.0), [0, 1, 0, 3])
    np.testing.assert_array_equal(zip_clusters(alike, (2, 2), 2, 1.0, 0.0), [0, 1, 0, 1])


def test_alpha_discounts_merged_features() -> None:
    alike = np.array([[1, 0.9, 0.8, 0.2], [0.9, 1, 0.8, 0.2], [0.8, 0.8, 1, 0.3], [0.2, 0.2, 0.3, 1]])
    np.testing.assert_array_equal(zip_clusters(alike, (4,), 2, 1.0, 1.0), [0, 0, 0, 3])
    np.testing.assert_array_equal(zip_clusters(alike, (4,), 2, 0.3, 1.0), [0, 0, 2, 2])


def test_beta_counts_merges_within_a_model() -> None:
    (x,) = features(2)
    doubled = x[:, [0, 0, 0, 0]] + 0.01 * features(4, seed=3)[0]
    other = features(4, seed=5)[0]
    assert len(Zip(beta=1.0)(moments([doubled, other]), 4).assignment(0).unique()) < 4
    assert len(Zip(beta=0.0)(moments([doubled, other]), 4).assignment(0).unique()) == 4


def test_zip_lifts_the_budget_rather_than_getting_stuck() -> None:
    x, y = features(2, 5)
    merge = Zip(beta=0.0)(moments([x, y]), 2)
    assert merge.merge.shape == (2, 7)
    close(merge.merge @ merge.unmerge, torch.eye(2, dtype=torch.float64))


def test_zip_keeps_the_width_of_the_first_model_by_default() -> None:
    assert Zip()(observed(3, 5)).merge.shape == (3, 8)
    assert Zip()(observed(5, 3), 6).merge.shape == (6, 8)


def test_zip_leaves_the_moments_alone() -> None:
    statistics = observed(5, 5)
    before = statistics.outer.clone()
    Zip()(statistics, 5)
    close(statistics.outer, before, rtol=0, atol=0)


# Permute


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 6), seed=SEEDS)
def test_permute_is_the_best_of_all_assignments(n: int, seed: int) -> None:
    statistics = observed(n, n, seed=seed)
    cross = statistics.correlation[:n, n:]
    best = max(itertools.permutations(range(n)), key=lambda pi: sum(float(cross[i, pi[i]]) for i in range(n)))
    merge = Permute()(statistics, n)
    close(merge.assignment(1)[list(best)], torch.arange(n))
    assert merge.bijective(1)
    assert merge.correlation == pytest.approx(float(cross[range(n), best].mean()))


def test_permute_of_a_narrower_model_leaves_features_to_the_first_alone() -> None:
    (x,) = features(5)
    merge = Permute()(moments([x, x[:, [3, 1]]]), 5)
    close(merge.assignment(1), torch.tensor([3, 1]))
    close(merge.M(0).diagonal(), torch.tensor([1, 0.5, 1, 0.5, 1], dtype=torch.float64))


def test_permute_of_a_wider_model_adds_the_rest_to_its_likest() -> None:
    (x,), (noise,) = features(3), features(5, seed=7)
    y = x[:, [2, 0, 1, 0, 2]]
    y[:, 3:] += 0.1 * noise[:, 3:]
    merge = Permute()(moments([x, y]), 3)
    close(merge.assignment(1), torch.tensor([2, 0, 1, 0, 2]))
    close(merge.merge @ merge.unmerge, torch.eye(3, dtype=torch.float64))
    assert not merge.bijective(1)


# Blocks


def blocks_of(n_blocks: int, s: int) -> torch.Tensor:
    return torch.arange(n_blocks * s).view(n_blocks, s)


def block_shuffle(n_blocks: int, s: int, order: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.cat([blocks_of(n_blocks, s)[b][shuffle(s, seed + int(b))] for b in order])


@pytest.mark.parametrize("method", [Zip(), Permute()], ids=str)
@pytest.mark.parametrize(("n_blocks", "s"), [(4, 5), (1, 6), (6, 1), (3, 2)])
def test_a_twin_with_relabelled_blocks_is_recovered(method, n_blocks: int, s: int) -> None:
    n, order = n_blocks * s, shuffle(n_blocks, 3)
    spaces, relabellings = [], []
    for seed, relabel_only in [(0, True), (50, False)]:
        (x,) = features(n, seed=seed)
        pi, sigma = block_shuffle(n_blocks, s, order, seed), block_shuffle(n_blocks, s, order.flip(0), seed + 9)
        blocks = (blocks_of(n_blocks, s),) * 3
        spaces.append(BlockMoments(moments([x, x[:, pi], x[:, sigma]]), blocks, relabel_only))
        relabellings.append((pi, sigma))
    merges, partners = match_blocks(spaces, method)
    for merge, (pi, sigma) in zip(merges, relabellings, strict=True):
        close(merge.assignment(0), torch.arange(n))
        close(merge.assignment(1), pi)
        close(merge.assignment(2), sigma)
        assert merge.correlation == pytest.approx(1)
    close(order[partners[1]], torch.arange(n_blocks))


def test_blocks_are_the_best_of_all_assignments() -> None:
    n_blocks, s = 4, 3
    for seed in range(10):
        spaces = [BlockMoments(observed(12, 12, seed=seed + 100 * i), (blocks_of(4, 3),) * 2) for i in range(2)]

        def value(a: int, b: int) -> float:
            total = 0.0
            for space in spaces:  # noqa: B023
                cross = space.moments.correlation[:12, 12:][a * s : a * s + s, b * s : b * s + s]
                orders = itertools.permutations(range(s))
                total += max(sum(float(cross[i, order[i]]) for i in range(s)) for order in orders) / s
            return total

        best = max(
            itertools.permutations(range(n_blocks)),
            key=lambda order: sum(value(a, order[a]) for a in range(n_blocks)),
        )
        close(match_blocks(spaces, Permute())[1][1], torch.tensor(best))


def test_blocks_decide_jointly() -> None:
    """One space cannot tell its blocks apart; the other can, and decides for both."""
    (x,), (clear,) = features(2), features(4, seed=1)
    same = x[:, [0, 1, 0, 1]]
    order = torch.tensor([2, 3, 0, 1])
    blocks = (blocks_of(2, 2),) * 2
    spaces = [BlockMoments(moments([same, same]), blocks), BlockMoments(moments([clear, clear[:, order]]), blocks)]
    merges, partners = match_blocks(spaces, Permute())
    close(partners[1], torch.tensor([1, 0]))
    for merge in merges:
        close(merge.assignment(1), order)


def test_blocks_may_lie_anywhere() -> None:
    """Blocks interleaved in model 0, contiguous in model 1: merged block b has the places of model 0's block b."""
    (x,) = features(6)
    interleaved = torch.tensor([[0, 2, 4], [1, 3, 5]])
    pi = torch.tensor([5, 1, 3, 4, 0, 2])
    space = BlockMoments(moments([x, x[:, pi]]), (interleaved, blocks_of(2, 3)))
    merges, partners = match_blocks([space], Zip())
    close(merges[0].assignment(0), torch.arange(6))
    close(merges[0].assignment(1), pi)
    close(partners[1], torch.tensor([1, 0]))


def test_a_space_for_relabelling_only_is_never_zipped() -> None:
    (x,) = features(2)
    doubled = x[:, [0, 0, 1, 1]] + 0.01 * features(4, seed=3)[0]
    statistics, blocks = moments([doubled, features(4, seed=5)[0]]), (blocks_of(1, 4),) * 2
    (zipped, relabelled), _ = match_blocks(
        [BlockMoments(statistics, blocks), BlockMoments(statistics, blocks, relabel_only=True)], Zip()
    )
    assert not zipped.bijective(0)
    assert relabelled.bijective(0)
    assert relabelled.bijective(1)


def test_an_unobserved_space_follows_the_others_block_by_block() -> None:
    (x,) = features(4)
    order = torch.tensor([3, 2, 0, 1])
    blocks = (blocks_of(2, 2),) * 2
    empty = Moments(0.0, torch.zeros(8).double(), torch.zeros(8, 8).double(), (4, 4))
    (merge, _), _ = match_blocks([BlockMoments(empty, blocks), BlockMoments(moments([x, x[:, order]]), blocks)], Zip())
    close(merge.assignment(1), torch.tensor([2, 3, 0, 1]))
    (merge,), partners = match_blocks([BlockMoments(empty, blocks)], Zip())
    close(partners[1], torch.arange(2))
    close(merge.merge, Merge.identity(4, 2).merge)


def test_blocks_of_different_widths() -> None:
    statistics = observed(6, 4)
    for method in (Zip(), Permute()):
        (merge,), _ = match_blocks([BlockMoments(statistics, (blocks_of(2, 3), blocks_of(2, 2)))], method)
        close(merge.merge @ merge.unmerge, torch.eye(6, dtype=torch.float64))
        (merge,), _ = match_blocks([BlockMoments(observed(4, 6), (blocks_of(2, 2), blocks_of(2, 3)))], method)
        close(merge.merge @ merge.unmerge, torch.eye(4, dtype=torch.float64))


def test_a_method_that_mixes_features_works_inside_blocks() -> None:
    class Mixing(Average):
        def __call__(self, moments: Moments, size: int | None = None) -> Merge:
            merge = super().__call__(moments, size)
            return dataclasses.replace(merge, unmerge=merge.unmerge * 0.5, correlation=0.25)

    (merge,), _ = match_blocks([BlockMoments(observed(4, 4), (blocks_of(2, 2),) * 2)], Mixing())
    assert merge.assignment(0) is None
    assert merge.correlation == 0.25


# Names and messages


def test_methods_by_name() -> None:
    assert resolve("zip") == Zip()
    assert resolve("permute").relabelling() == Permute()
    assert resolve("average").relabelling() == Average()
    assert Zip(0.1, 0.5).relabelling() == Permute()
    assert resolve(Zip(0.1, 0.5)) == Zip(0.1, 0.5)
    assert [METHODS[name]().name for name in METHODS] == list(METHODS)


NOTHING = Moments(0.0, torch.zeros(2).double(), torch.zeros(2, 2).double(), (1, 1))
BROKEN = Moments(3.0, torch.tensor([1, torch.nan]).double(), torch.ones(2, 2).double(), (1, 1))
PAIR = (blocks_of(2, 1), blocks_of(2, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: resolve("zipp"), OptionError, r"one of 'energy', 'zip', .*; got 'zipp'. Did you mean 'zip'\?"),
        (lambda: resolve("soup"), OptionError, r"one of 'energy', 'zip', 'permute', .*; got 'soup'.$"),
        (lambda: resolve(Zip), OptionError, r"with its settings, such as `Zip\(alpha=0.1\)`; got `<class"),
        (lambda: resolve(3), OptionError, "a name or a method with its settings.*; got `3`"),
        (lambda: Zip(alpha=0), OptionError, "0 < alpha <= 1; got alpha=0. Without discount it is alpha=1"),
        (lambda: Zip(alpha=float("nan")), OptionError, "got alpha=nan"),
        (lambda: Zip(beta=1.5), OptionError, "0 <= beta <= 1; got beta=1.5. To merge across models only, pass beta=0"),
        (lambda: Zip()(observed(3, 3), 7), OptionError, "1 to 6 of the 6 features of this space; got `size` 7"),
        (lambda: Zip()(observed(3, 3), 0), OptionError, "got `size` 0"),
        (lambda: Permute()(observed(3, 3), 2), OptionError, '`size` must be 3 to 6; got 2. Use `method="zip"`'),
        (lambda: Average()(observed(3, 3), 4), OptionError, "keeps every feature: `size` must be 3; got 4"),
        (lambda: Average()(observed(3, 4), 3), InputError, r"models of equal width; this space has \[3, 4\] features"),
        (lambda: Zip()(NOTHING, 1), DataError, "needs observed features; these moments hold 0 positions"),
        (lambda: Permute()(BROKEN, 1), DataError, "finite moments; those of 1 of 2 features are not"),
        (lambda: Merge.from_clusters(torch.tensor([0, 1]), (1, 2)), InputError, r"2 labels for sizes \(1, 2\)"),
        (lambda: Merge.from_clusters(torch.tensor([0, 2]), (1, 1)), InputError, "of 3 ids, 1 has no member"),
        (lambda: BlockMoments(observed(2, 2), PAIR[:1]), InputError, "one entry per model; got 1 for 2 models"),
        (
            lambda: BlockMoments(observed(2, 2), (PAIR[0], torch.tensor([[0], [0]]))),
            InputError,
            r"blocks of model 1 must hold each of its 2 features exactly once; got \(2, 1\) features, 1 of them diff",
        ),
        (
            lambda: match_blocks([BlockMoments(observed(4, 4), (blocks_of(2, 2), blocks_of(4, 1)))], Zip()),
            InputError,
            r"need the same number of them in all models; got \[\[2, 4\]\] \(spaces × models\)",
        ),
        (
            lambda: match_blocks(
                [BlockMoments(dataclasses.replace(observed(2, 4), count=0.0), (blocks_of(2, 1), blocks_of(2, 2)))],
                Zip(),
            ),
            InputError,
            r"needs blocks of one size; got blocks of \[1, 2\] features",
        ),
    ],
)
def test_messages(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "module",
    [
        "",
        ".merge",
        ".activations.zipit",
        ".activations.permute",
        ".activations.average",
        ".blockwise",
        ".assignment",
        ".clusters",
        ".method",
        ".problem",
        ".registry",
        ".similarities",
        ".weights.descent",
        ".weights.signatures",
        ".weights.tied_blocks",
        ".weights.weight_matching",
    ],
)
def test_examples_in_docstrings(module: str) -> None:
    found = importlib.import_module("fxzip.matching" + module)
    result = doctest.testmod(found, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


# Speed


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds, the better of two runs: what else the machine does hardly counts."""
    taken = []
    for _ in range(2):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return min(taken)


@pytest.mark.slow
@pytest.mark.parametrize("method", [Zip(), Zip(0.3, 0.125), Zip(0.1, 0.5), Permute()], ids=str)
def test_two_models_of_2048_features_take_three_seconds_at_most(method) -> None:
    statistics = observed(2048, 2048)
    assert seconds(lambda: method(statistics, 2048)) <= 3


@pytest.mark.slow
@pytest.mark.parametrize(("n_blocks", "s", "spaces"), [(16, 64, 3), (32, 32, 1)])
def test_blocks_of_1024_features_take_a_second(n_blocks: int, s: int, spaces: int) -> None:
    group = [BlockMoments(observed(1024, 1024, seed=i), (blocks_of(n_blocks, s),) * 2) for i in range(spaces)]
    assert seconds(lambda: match_blocks(group, Zip())) <= 1.5
