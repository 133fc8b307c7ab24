"""Unmerging by linear regression: against least squares, and what it does to a zip."""

import pytest
import torch
from models import randomise
from models.networks import Residual
from test_matching import features, observed, shuffle

import fxzip
from fxzip.analysis import relative_difference
from fxzip.matching import Energy, Permute, Recover, WeightMatching, Zip
from fxzip.matching.activations.recover import recovered
from fxzip.matching.moments import moments
from fxzip.matching.problem import Problem, Space

close = torch.testing.assert_close


@pytest.mark.parametrize("method", [Zip(), Zip(0.1, 0.5), Permute()], ids=str)
def test_it_is_the_regression_of_the_features_on_the_merged_ones(method):
    x = torch.cat(features(6, 6, seed=4), 1)
    x = x @ torch.randn(12, 12, dtype=x.dtype)  # all features correlate
    own = moments([x[:, :6], x[:, 6:]])
    merge = method(own, 6)
    centred = x - x.mean(0)
    wanted = torch.linalg.lstsq(centred @ merge.merge.T, centred).solution.T
    found = recovered(merge, own, 1e-12)
    close(found.unmerge, wanted, atol=1e-6, rtol=1e-6)
    close(found.merge, merge.merge, atol=0, rtol=0)


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0])
def test_merging_undoes_unmerging_and_no_feature_comes_back_worse(ridge):
    (x, y) = features(8, 8, seed=1)
    y = y + x @ torch.randn(8, 8, dtype=x.dtype)
    own = moments([x, y])
    merge = Zip()(own, 8)
    found = recovered(merge, own, ridge)
    close(found.merge @ found.unmerge, torch.eye(8, dtype=torch.float64))
    values = torch.cat([x - x.mean(0), y - y.mean(0)], 1)
    copied, read = (values - values @ merge.merge.T @ m.unmerge.T for m in (merge, found))
    assert read.square().sum() < 0.9 * copied.square().sum()
    assert bool((read.square().sum(0) <= copied.square().sum(0) + 1e-9).all())


def test_copies_are_recovered_as_they_are():
    (x,) = features(7)
    order = shuffle(7)
    own = moments([x, x[:, order]])
    merge = Permute()(own, 7)
    close(recovered(merge, own, 1e-3).unmerge, merge.unmerge, atol=1e-12, rtol=0)


def test_what_it_leaves_alone():
    own = observed(4, 4)
    free = Space((4, 4), moments=own)
    relabelled = Space((4, 4), legality="relabel only", moments=own)
    unseen = Space((4, 4))
    found = Recover().match(Problem((free, relabelled, unseen)))
    assert found[0].labels() is None
    assert all(merge.labels() is not None for merge in found[1:])
    apart = Zip()(own, 8)
    assert recovered(apart, own, 1e-3) is apart
    still = moments([torch.ones(9, 2), torch.ones(9, 2)])
    merge = Permute()(still, 2)
    assert recovered(merge, still, 1e-3) is merge


def test_it_needs_what_the_inner_method_needs():
    assert Recover(WeightMatching()).needs == {"moments", "weights"}
    assert Recover(Energy()).needs == {"moments", "downstream"}
    assert Recover(Zip(0.1, 0.5)).relabelling() == Permute()
    with pytest.raises(fxzip.OptionError, match=r"`Recover` needs `ridge` > 0; got ridge=0. The default is 1e-3."):
        Recover(ridge=0)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("until", [None, "layer1", "layer1_0_relu", "layer2.0.bn1"])
def test_heads_are_nearer_to_their_networks_than_by_copying(until):
    models = [randomise(Residual(4), 1), randomise(Residual(5), 2)]
    data = [torch.randn(32, 3, 8, 8) for _ in range(4)]
    x = torch.randn(64, 3, 8, 8)
    gap = {}
    for method in (Zip(), Recover(Zip())):
        zipped = fxzip.compile_zip(*models, x[:2], data=data, method=method, refit="repair", until=until)
        with torch.no_grad():
            gap[method] = sum(float((m(x) - y).norm() / m(x).norm()) for m, y in zip(models, zipped(x), strict=True))
    assert gap[Recover(Zip())] < gap[Zip()]


@pytest.mark.parametrize("until", [None, "layer1"])
def test_a_twin_is_exact(until):
    model = randomise(Residual())
    x = torch.randn(6, 3, 8, 8)
    twin = fxzip.relabel(model, x)
    zipped = fxzip.compile_zip(model, twin, x[:2], data=[x], method=Recover(Permute()), refit="repair", until=until)
    for output in zipped(x):
        assert relative_difference(model(x), output) <= 1e-4
    merges = Recover().match(Problem(()))
    assert merges == []
