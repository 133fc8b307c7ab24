"""Clusters by lost energy: against the direct computation, by hand, and what a user gets by default."""

import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from models import randomise
from models.networks import Residual
from torch import nn

import fxzip
from fxzip.matching.energy import merge_order
from fxzip.matching.energy.clusterwise import Clusters, reconstruction_errors, variance_shares
from fxzip.matching.energy.elimination import Elimination
from fxzip.matching.energy.energy import Energy, downstream_metric, energy_merge, unexplained_variance
from fxzip.matching.moments import moments
from fxzip.matching.problem import Problem, Space
from fxzip.rewriting.zip_plan import problem_of


def correlated(seed, n=16, rank=6):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((200, rank)) @ rng.standard_normal((rank, n)) + rng.standard_normal((200, n))


def explained(alike, read, K, ridge):
    """Energy of the outputs that the best linear reading of y = K z tells, from the definition."""
    R = alike + ridge * np.eye(len(alike))
    passed = R @ K.T
    return np.trace(read @ passed @ np.linalg.solve(K @ passed, passed.T))


def some_reading(seed, n=16):
    W = np.random.default_rng(seed).standard_normal((9, n))
    return W.T @ W / 9


def rows(found, n):
    """The matrix K of what an `Elimination` has kept."""
    K = np.zeros((n, n))
    K[found.cluster, np.arange(n)] = found.coefficients
    return K[np.unique(found.cluster)]


@pytest.mark.parametrize("together", [1, 64])
def test_what_a_step_loses_is_what_regression_can_no_longer_tell(together, monkeypatch):
    monkeypatch.setattr(Elimination, "_TOGETHER", together)
    alike, read, ridge = np.corrcoef(correlated(0).T), some_reading(0), 1e-3
    found = Elimination(alike, np.linalg.inv(alike + ridge * np.eye(16)), read)
    before = explained(alike, read, np.eye(16), ridge)
    for _ in range(15):
        lost = found.step()
        after = explained(alike, read, rows(found, 16), ridge)
        assert lost == pytest.approx(before - after, rel=1e-6, abs=1e-9)
        before = after
    assert (found.coefficients >= 0).all()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("seed", range(3))
def test_the_first_step_is_the_best_of_all_pairs_and_mixtures(seed):
    alike, read, ridge = np.corrcoef(correlated(seed).T), some_reading(seed), 1e-3
    whole = explained(alike, read, np.eye(16), ridge)
    best = np.inf
    for r in range(16):
        for s in set(range(16)) - {r}:
            for angle in np.linspace(0, np.pi / 2, 181):
                K = np.eye(16)
                K[s] = np.cos(angle) * K[s] + np.sin(angle) * K[r]
                best = min(best, whole - explained(alike, read, np.delete(K, r, 0), ridge))
    lost = Elimination(alike, np.linalg.inv(alike + ridge * np.eye(16)), read).step()
    assert best * (1 - 2e-3) <= lost <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_looking_late_loses_hardly_more_than_looking_at_all(seed):
    alike, read = np.corrcoef(correlated(seed, 40, 12).T), some_reading(seed, 40)
    lazy, eager = (Elimination(alike, np.linalg.inv(alike + 1e-3 * np.eye(40)), read) for _ in range(2))
    lost = [0.0, 0.0]
    for _ in range(20):
        lost[0] += lazy.step()
        eager._look(np.flatnonzero(~eager.gone))
        lost[1] += eager.step()
    assert lost[0] == pytest.approx(lost[1], rel=0.1)


@pytest.mark.parametrize("deficit", [0.0, 1e-12, 1e-7, 1e-6])
def test_equal_pairs_go_first_however_much_they_are_read(deficit):
    """0 and 1 are equal but for rounding; 2 and 3, and 4 and 5, are equal, and alike on the data only. The latter are
    hardly read: merging all four would lose less than rounding makes of 0 and 1."""
    alike = np.eye(6)
    alike[0, 1] = alike[1, 0] = 1 - deficit
    alike[2:, 2:] = 1 - 5e-5
    alike[[2, 3, 4, 5], [3, 2, 5, 4]] = 1.0
    np.fill_diagonal(alike, 1.0)
    read = np.diag([1.0, 1.0, 1e-6, 1e-6, 1e-6, 1e-6])
    found = Elimination(alike, np.linalg.inv(alike + 1e-5 * np.eye(6)), read)
    for _ in range(3):
        found.step()
    clusters = {frozenset(np.flatnonzero(found.cluster == c).tolist()) for c in found.cluster}
    assert clusters == {frozenset({0, 1}), frozenset({2, 3}), frozenset({4, 5})}


def test_a_cluster_keeps_the_energy_of_its_principal_direction():
    """0 and 1 go together first; what is kept of both is the greater eigenvalue of their Gram matrix."""
    alike = np.eye(3)
    alike[0, 1] = alike[1, 0] = 0.9
    found = Elimination(alike, np.linalg.inv(alike + 1e-3 * np.eye(3)), np.diag([1.0, 0.5, 5.0]))
    found.step()
    assert found.cluster[0] == found.cluster[1] != found.cluster[2]
    root = np.sqrt([1.0, 0.5])
    gram = np.array([[1.0, 0.9], [0.9, 1.0]]) * np.outer(root, root)
    assert found.kept[found.cluster[0]] == pytest.approx(np.linalg.eigvalsh(gram)[1])


@pytest.mark.parametrize("n", [40, 100])
def test_rows_that_are_gone_may_be_dropped(n, monkeypatch):
    alike, read = np.corrcoef(correlated(1, n, 12).T), some_reading(1, n)
    found = []
    for together in (4, 10**3):  # the second never drops any
        monkeypatch.setattr(Elimination, "_TOGETHER", together)
        loop = Elimination(alike, np.linalg.inv(alike + 1e-3 * np.eye(n)), read)
        lost = [loop.step() for _ in range(n - 2)]
        found.append((loop.cluster, loop.coefficients, np.array(lost)))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-6)
    np.testing.assert_allclose(found[0][2], found[1][2], rtol=1e-6)


@pytest.fixture
def eliminations(monkeypatch):
    """The numbers of features of the eliminations that were run."""
    run = []

    class Counted(Elimination):
        def __init__(self, alike, P, Q):
            run.append(len(alike))
            super().__init__(alike, P, Q)

    monkeypatch.setattr(merge_order, "Elimination", Counted)
    monkeypatch.setattr(merge_order, "_known", OrderedDict())
    return run


def test_one_elimination_serves_all_widths(eliminations):
    features = torch.from_numpy(correlated(3, 24)).split(12, dim=1)
    seen = moments(list(features))
    metric = downstream_metric(seen, [])
    fresh = {}
    for size in (12, 6, 3):  # each asks for more steps than are known
        fresh[size] = energy_merge(seen, metric, size, 0.01)
    losses = unexplained_variance(seen, metric, 0.01)
    assert eliminations == [24] * 4
    for size, merge in fresh.items():
        again = energy_merge(moments(list(features)), metric.clone(), size, 0.01)
        assert torch.equal(again.merge, merge.merge)
        assert all(torch.equal(again.assignment(k), merge.assignment(k)) for k in range(2))
    assert np.array_equal(unexplained_variance(seen, metric, 0.01), losses)
    assert eliminations == [24] * 4
    energy_merge(seen, 2 * metric + torch.eye(24), 12, 0.01)  # other readers, another order
    assert eliminations == [24] * 5


def test_widths_by_need_merge_each_space_once(eliminations):
    torch.manual_seed(0)
    models = [randomise(nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 14), nn.ReLU(), nn.Linear(14, 3)))
              for _ in range(2)]  # fmt: skip
    x = torch.randn(400, 6)
    fxzip.compile_zip(*models, x, data=x, width="auto", max_cost=0.8, budget="flops", progress=False)
    assert sorted(eliminations) == [6, 28, 40], "the curves, and the merges of some widths: one run for each space"


def test_what_others_tell_together_may_go():
    """z_2 = (z_0 + z_1) / sqrt 2 is like neither, and lost without loss; pairs alone would not see it."""
    x = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 2] = (x[:, 0] + x[:, 1]) / 2**0.5
    seen = moments([x])
    read = downstream_metric(seen, [[torch.eye(3)[:, None]]])
    losses = unexplained_variance(seen, read, 0.0, 1e-6)
    assert losses[2] < 1e-4
    assert losses[1] > 0.2
    assert reconstruction_errors(seen, variance_shares(seen, [[torch.eye(3)[:, None]]]), 0.0)[2] > 0.05


def test_reading_by_hand():
    x = torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * torch.tensor([1, 2, 3.0])
    W = torch.rand(4, 2, 3, dtype=torch.float64)
    found, seen = downstream_metric(moments([x[:, :3]]), [[W]]), torch.corrcoef(x.T)
    wanted = torch.zeros(3, 3, dtype=torch.float64)
    for output in W * x.std(0, correction=0):
        wanted += output.T @ output / sum(tap @ seen @ tap for tap in output)
    torch.testing.assert_close(found, wanted / (wanted * seen).sum())


# clusters that are read alone ----------------------------------------------------------------------------------------


def textbook(alike, share, size):
    """Every pair looked at before every merge, clusters as lists of members with their direction."""
    root = np.sqrt(share)
    gram = alike * np.outer(root, root)
    clusters = [(np.eye(len(share))[i], [i]) for i in range(len(share))]
    while len(clusters) > size:
        losses = {}
        for a in range(len(clusters)):
            for b in range(len(clusters)):
                if a != b:
                    u, v = clusters[a][0], clusters[b][0]
                    c = max(u @ gram @ v, 0)
                    pair = np.array([[u @ gram @ u, c], [c, v @ gram @ v]])
                    losses[a, b] = np.linalg.eigvalsh(pair)[0]
        a, b = min(losses, key=losses.get)
        (u, own), (v, other) = clusters[a], clusters[b]
        c = max(u @ gram @ v, 0)
        _, vectors = np.linalg.eigh(np.array([[u @ gram @ u, c], [c, v @ gram @ v]]))
        p, q = np.abs(vectors[:, 1])
        clusters[a] = (p * u + q * v, own + other)
        del clusters[b]
    return {frozenset(members) for _, members in clusters}


def clustered(alike, share, size):
    state = Clusters(alike, share)
    for _ in range(len(share) - size):
        state.step()
    return state


@pytest.mark.parametrize("seed", range(5))
def test_the_fast_loop_is_the_textbook_loop(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, 6)) @ rng.standard_normal((6, 16)) + rng.standard_normal((200, 16))
    alike, share = np.corrcoef(x.T), rng.random(16) + 0.05
    found = clustered(alike, share, 7).cluster
    assert {frozenset(np.flatnonzero(found == c).tolist()) for c in np.unique(found)} == textbook(alike, share, 7)


def test_coefficients_are_those_of_the_principal_direction():
    """Two features in one cluster: p² of the leading eigenvector, by hand."""
    alike = np.array([[1.0, 0.6], [0.6, 1.0]])
    share = np.array([0.8, 0.2])
    kept = clustered(alike, share, 1).coefficients ** 2 * share
    gram = alike * np.sqrt(np.outer(share, share))
    leading = np.linalg.eigh(gram)[1][:, 1]
    np.testing.assert_allclose(kept, leading**2 * share, rtol=1e-12)


def test_what_nobody_reads_is_lost_first():
    """Correlation would join the two that matter; energy drops the one that does not."""
    x = torch.randn(2000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0] + x[:, 1]
    seen = moments([x])
    read = downstream_metric(seen, [[torch.tensor([[[1.0, 1.0, 1e-9]], [[1.0, -1.0, 1e-9]]])]])
    assert len(set(energy_merge(seen, read, 2, 0.0).labels().tolist()[:2])) == 2
    assert len(set(fxzip.Zip()(seen, 2).labels().tolist()[:2])) == 1


def test_rows_of_the_merge_are_averages():
    """M has non-negative rows that sum to one, U is a membership, and M U = 1."""
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(1)).relu()
    x[:, 3] = 0
    seen = moments([x[:, :6], x[:, 6:]])
    merge = energy_merge(seen, downstream_metric(seen, [[torch.rand(5, 2, 6)]] * 2), 6, 0.01)
    assert bool((merge.merge >= 0).all())
    torch.testing.assert_close(merge.merge @ merge.unmerge, torch.eye(6, dtype=torch.float64))
    assert merge.labels() is not None


def test_energies_do_not_depend_on_the_scale_of_outputs():
    """A BatchNorm behind a reader may scale its outputs as it likes."""
    x = torch.randn(100, 4, dtype=torch.float64)
    weight = torch.rand(3, 2, 4, dtype=torch.float64)
    scaled = weight * torch.tensor([[[1.0]], [[100.0]], [[0.01]]])
    for share in (variance_shares, downstream_metric):
        torch.testing.assert_close(share(moments([x]), [[weight]]), share(moments([x]), [[scaled]]))


def test_without_readers_all_count_the_same():
    x = torch.randn(50, 4)
    torch.testing.assert_close(
        variance_shares(moments([x[:, :1], x[:, 1:]]), ()), torch.tensor([1, 1 / 3, 1 / 3, 1 / 3]).double()
    )
    torch.testing.assert_close(
        downstream_metric(moments([x[:, :1], x[:, 1:]]), ()), torch.tensor([1, 1 / 3, 1 / 3, 1 / 3]).double().diag()
    )


def test_readers_are_the_weights_that_sum_over_a_space():
    """Of a linear net with a convolution in front: the next weight, flattened places as taps."""
    nets = [nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)) for _ in range(2)]
    from fxzip.compiler.survey import survey
    from fxzip.tracing.calls import as_call

    trunk = survey(nets, as_call(torch.ones(1, 1, 4, 4))).trunk()
    [space] = problem_of(trunk, {}, Energy()).spaces
    for net, (weights,) in zip(nets, space.downstream, strict=True):
        torch.testing.assert_close(weights, net[3].weight.detach().reshape(5, 4, 4).mT)


@pytest.mark.parametrize("method", ["energy", "auto"])
def test_a_model_with_its_relabelled_copy(method):
    """Under the default refit, least squares."""
    model = randomise(Residual()).double()
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    zipped = fxzip.compile_zip(model, fxzip.relabel(model, x[:2]), x[:2], data=[x], method=method, progress=False)
    assert "Energy" in zipped.report["method"]
    for output in zipped(x):
        torch.testing.assert_close(output, model.eval()(x), rtol=1e-7, atol=1e-7)


def test_widths_may_differ():
    x = torch.randn(200, 10, generator=torch.Generator().manual_seed(2))
    [merge] = Energy().match(Problem((Space((4, 6), moments=moments([x[:, :4], x[:, 4:]])),)))
    assert merge.merge.shape == (4, 10)


@pytest.mark.parametrize(("settings", "message"), [
    ({"ridge": 0.0}, "`Energy` needs `ridge` > 0; got ridge=0.0. The default is 1e-5."),
    ({"ridge": float("nan")}, "`Energy` needs `ridge` > 0; got ridge=nan. The default is 1e-5."),
    ({"floor": -1.0}, "`Energy` needs `floor` >= 0; got floor=-1.0. The default is 0.01."),
])  # fmt: skip
def test_settings_out_of_range(settings, message):
    with pytest.raises(fxzip.OptionError, match=f"^{re.escape(message)}$"):
        Energy(**settings)


@pytest.mark.parametrize("seed", [1, 2, 13])
def test_what_is_left_keeps_its_precision(seed):
    """Features that are read very unlike one another: the greater part of a cluster must be the one that stays, or what
    is left of P drowns in rounding, losses fall below zero and the loop does not end."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((20 if seed % 2 else 400, 64))
    C = np.corrcoef((X + 0.5 * rng.standard_normal((len(X), 1))).T)
    W = rng.standard_normal((50, 64)) * 10 ** rng.uniform(-4, 0, (1, 64))
    G = W.T @ W / ((W.T @ W) * C).sum()
    G += np.eye(64) * 1e-2 * G.diagonal().mean()
    found = Elimination(C, np.linalg.inv(C + 1e-5 * np.eye(64)), G)
    for _ in range(62):
        found.step()
        assert found.scale.max() < 100
        assert found.p[~found.gone].min() > 0
        assert found.loss.min() >= 0
