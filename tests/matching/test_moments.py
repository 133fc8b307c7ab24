"""Moments: sums that add, and what they say of features."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxzip.matching.moments import SAMPLES, Moments, moments

close = torch.testing.assert_close


def features(positions: int, *sizes: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(5, sum(sizes), generator=generator, dtype=torch.float64)
    return list((torch.randn(positions, 5, generator=generator, dtype=torch.float64) @ mixing + 2).split(sizes, 1))


def same(found: Moments, expected: Moments) -> None:
    assert found.sizes == expected.sizes
    assert found.count == expected.count
    close(found.total, expected.total, rtol=1e-12, atol=1e-12)
    close(found.outer, expected.outer, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(0, 1000))
def test_moments_of_parts_add_to_those_of_the_whole(parts, seed):
    whole = features(sum(parts), 4, 3, seed=seed)
    first, *rest = [moments(part) for part in zip(*(x.split(parts) for x in whole), strict=True)]
    same(sum(rest, first), moments(whole))


def test_mean_covariance_and_correlation_are_those_of_torch():
    a, b = features(200, 6, 4)
    found, joint = moments([a, b]), torch.cat([a, b], 1)
    close(found.mean, joint.mean(0))
    close(found.covariance, joint.T.cov(correction=0))
    close(found.correlation, joint.T.corrcoef(), rtol=1e-10, atol=1e-10)


def test_features_that_never_vary_are_not_alive_and_correlate_with_nothing_but_themselves():
    (x,) = features(50, 4)
    x[:, 1], x[:, 3] = 3.0, 0.0
    found = moments([x])
    assert found.alive.tolist() == [True, False, True, False]
    still = ~found.alive
    close(found.correlation[still], torch.eye(4, dtype=torch.float64)[still])


def test_selection_is_that_of_the_features():
    a, b = features(60, 6, 4)
    parts = [torch.tensor([5, 0]), torch.tensor([3, 1, 2])]
    same(moments([a, b]).select(parts), moments([a[:, parts[0]], b[:, parts[1]]]))
    drawn = Moments(60.0, *[moments([a, b]).total, moments([a, b]).outer], (6, 4), torch.cat([a, b], 1))
    close(drawn.select(parts).samples, torch.cat([a[:, parts[0]], b[:, parts[1]]], 1))


def test_offsets_are_where_models_start():
    assert moments(features(3, 6, 4, 2)).offsets() == (0, 6, 10, 12)


@pytest.mark.parametrize(("ours", "theirs"), [(None, None), (100, None), (None, 100), (400, 300)])
def test_samples_are_kept_up_to_a_limit(ours, theirs):
    def part(count):
        whole = moments(features(10, 2))
        drawn = None if count is None else torch.full((count, 2), float(count))
        return Moments(whole.count, whole.total, whole.outer, whole.sizes, drawn)

    found = (part(ours) + part(theirs)).samples
    if ours is None and theirs is None:
        assert found is None
    else:
        close(found[:, 0], torch.tensor([float(n) for n in (ours, theirs) if n for _ in range(n)])[:SAMPLES])


def test_nothing_observed_has_mean_zero_and_no_live_feature():
    empty = Moments(0.0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64), (3,))
    assert not empty.alive.any()
    close(empty.mean, torch.zeros(3, dtype=torch.float64))
    close(empty.correlation, torch.eye(3, dtype=torch.float64))
