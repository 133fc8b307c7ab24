"""Clusters by lost energy: against the direct computation, by hand, and what a user gets by default."""

import numpy as np
import pytest
import torch
from networks import Residual, randomise
from torch import nn

import fxzip
from fxzip.matching.energy import Energy, energies, energy_clusters, energy_merge
from fxzip.matching.problem import Problem, Space
from fxzip.moments import moments
from fxzip.plan import problem_of


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


@pytest.mark.parametrize("seed", range(5))
def test_the_fast_loop_is_the_textbook_loop(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, 6)) @ rng.standard_normal((6, 16)) + rng.standard_normal((200, 16))
    alike, share = np.corrcoef(x.T), rng.random(16) + 0.05
    found, _ = energy_clusters(alike, share, 7)
    assert {frozenset(np.flatnonzero(found == c).tolist()) for c in np.unique(found)} == textbook(alike, share, 7)


def test_coefficients_are_those_of_the_principal_direction():
    """Two features in one cluster: p² of the leading eigenvector, by hand."""
    alike = np.array([[1.0, 0.6], [0.6, 1.0]])
    share = np.array([0.8, 0.2])
    _, kept = energy_clusters(alike, share, 1)
    gram = alike * np.sqrt(np.outer(share, share))
    leading = np.linalg.eigh(gram)[1][:, 1]
    np.testing.assert_allclose(kept, leading**2 * share, rtol=1e-12)


def test_what_nobody_reads_is_lost_first():
    """Correlation would join the two that matter; energy drops the one that does not."""
    x = torch.randn(2000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0] + x[:, 1]
    seen = moments([x])
    share = energies(seen, [[torch.tensor([[1.0, 1.0, 1e-9]])]])
    assert len(set(energy_merge(seen, share, 2, 0.0).labels().tolist()[:2])) == 2
    assert len(set(fxzip.Zip()(seen, 2).labels().tolist()[:2])) == 1


def test_rows_of_the_merge_are_averages():
    """M has non-negative rows that sum to one, U is a membership, and M U = 1."""
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(1)).relu()
    x[:, 3] = 0
    merge = energy_merge(moments([x[:, :6], x[:, 6:]]), torch.rand(12, dtype=torch.float64), 6, 0.01)
    assert bool((merge.merge >= 0).all())
    torch.testing.assert_close(merge.merge @ merge.unmerge, torch.eye(6, dtype=torch.float64))
    assert merge.labels() is not None


def test_energies_do_not_depend_on_the_scale_of_outputs():
    """A BatchNorm behind a reader may scale its outputs as it likes."""
    x = torch.randn(100, 4, dtype=torch.float64)
    weight = torch.rand(3, 4, dtype=torch.float64)
    scaled = weight * torch.tensor([[1.0], [100.0], [0.01]])
    torch.testing.assert_close(energies(moments([x]), [[weight]]), energies(moments([x]), [[scaled]]))


def test_without_readers_all_count_the_same():
    x = torch.randn(50, 4)
    torch.testing.assert_close(
        energies(moments([x[:, :1], x[:, 1:]]), ()), torch.tensor([1, 1 / 3, 1 / 3, 1 / 3]).double()
    )


def test_readers_are_the_weights_that_sum_over_a_space():
    """Of a linear net with a convolution in front: the squares of the next weight, flattened places summed."""
    nets = [nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)) for _ in range(2)]
    from fxzip.compiler import survey
    from fxzip.inputs import as_call

    trunk = survey(nets, as_call(torch.ones(1, 1, 4, 4))).trunk()
    [space] = problem_of(trunk, {}, Energy()).spaces
    for net, (squares,) in zip(nets, space.readers, strict=True):
        torch.testing.assert_close(squares, net[3].weight.detach().double().square().reshape(5, 4, 4).sum(2))


@pytest.mark.parametrize("method", ["energy", "zip"])
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
