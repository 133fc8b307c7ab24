"""CCA Merge: against scikit-learn, by hand, and through whole networks."""

import copy

import pytest
import torch
from sklearn.cross_decomposition import CCA as Reference
from test_matching import observed
from torch import nn

import fxzip
from fxzip.matching import CCA, Merge, Permute, Problem, Space
from fxzip.matching.activations.cca import is_mean, shares
from fxzip.matching.moments import moments

close = torch.testing.assert_close


def centred(positions, *widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(positions, 3, generator=generator, dtype=torch.double)
    mixed = [
        source @ torch.randn(3, n, generator=generator, dtype=torch.double)
        + 0.5 * torch.randn(positions, n, generator=generator, dtype=torch.double)
        for n in widths
    ]
    return [x - x.mean(0) for x in mixed]


def orthogonal(n, seed):
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.double))[0]


def test_one_feature_by_hand():
    x = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.double)
    merge = CCA(ridge=0)(moments([x, -2 * x]))
    close(merge.merge, torch.tensor([[0.5, -0.25]]).double())
    close(merge.unmerge, torch.tensor([[1.0], [-2.0]]).double())
    assert merge.correlation == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_canonical_correlations_are_those_of_scikit_learn(seed):
    x, y = centred(200, 4, 4, seed=seed)
    scores = Reference(n_components=4, scale=False, max_iter=20_000, tol=1e-12).fit_transform(x.numpy(), y.numpy())
    first, other = (torch.from_numpy(score) for score in scores)
    reference = (first * other).sum(0) / (first.norm(dim=0) * other.norm(dim=0))
    assert CCA(ridge=0)(moments([x, y])).correlation == pytest.approx(float(reference.mean()), abs=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.1, 10.0])
def test_what_is_mapped_has_the_covariance_of_the_first_model_and_is_mapped_back(ridge):
    x, y, z = centred(200, 5, 5, 5)
    merge = CCA(ridge=ridge)(moments([x, y, z]))
    wanted = moments([x]).covariance + ridge * x.square().mean() * torch.eye(5).double()
    for k, own in ((1, y), (2, z)):
        there = 3 * merge.M(k)
        covariance = moments([own]).covariance + ridge * own.square().mean() * torch.eye(5).double()
        close(there @ covariance @ there.T, wanted)
        close(merge.U(k) @ there, torch.eye(5).double())
    close(merge.U(0), torch.eye(5).double())


def test_mapped_features_correlate_more_than_paired_ones():
    x, y = centred(500, 6, 6)
    mapped = y @ (2 * CCA(ridge=0)(moments([x, y])).M(1)).T
    paired = y[:, Permute()(moments([x, y])).M(1).argmax(1)]

    def together(own):
        return float(((x * own).sum(0) / (x.norm(dim=0) * own.norm(dim=0))).mean())

    assert together(mapped) > together(paired) + 0.05


def mixed(net, *maps):
    """The network with an orthogonal map behind every linear layer but the last, undone in the next."""
    result = copy.deepcopy(net)
    with torch.no_grad():
        for i, q in enumerate(maps):
            result[i].weight.copy_(q @ result[i].weight)
            result[i].bias.copy_(q @ result[i].bias)
            result[i + 1].weight.copy_(result[i + 1].weight @ q.T)
    return result


@pytest.mark.parametrize("width", [5, 8])  # 8: features that span less than the space
def test_planted_orthogonal_mixing_between_linear_layers_is_recovered(width):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, width), nn.Linear(width, 7), nn.Linear(7, 3)).double()
    twins = [mixed(net, orthogonal(width, seed), orthogonal(7, seed + 1)) for seed in (2, 4)]
    x = torch.randn(200, 6, dtype=torch.double)
    zipped = fxzip.compile_zip([net, *twins], x, data=[x], method="cca", refit=None)
    fresh = torch.randn(50, 6, dtype=torch.double)
    first, *others = zipped(fresh)
    close(first, net(fresh), atol=1e-9, rtol=1e-9)
    for output in others:  # unmerged by a matrix in single precision
        close(output, net(fresh), atol=1e-5, rtol=1e-5)


def test_relabelled_twins_with_nonlinearities_are_recovered_up_to_the_sample():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x = torch.randn(500, 4, dtype=torch.double)
    twin = fxzip.relabel(net, x)
    for output in fxzip.compile_zip(net, twin, x, data=[x], method=CCA(), refit=None)(x):
        close(output, net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("refit", ["repair", "batchnorm", "lstsq"])
def test_refits_of_a_relabelled_twin_with_batchnorm_leave_it_exact(refit):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)).double()
    x = torch.randn(16, 3, 8, 8, dtype=torch.double)
    net(x)
    twin = fxzip.relabel(net.eval(), x)
    reset = fxzip.compile_zip(net, net, x, data=[x], method="average", refit=refit)(x)[0]
    for output in fxzip.compile_zip(net, twin, x, data=[x], method="cca", refit=refit)(x):
        close(output, reset, atol=1e-5, rtol=1e-5)


class Normalised(nn.Module):
    """Linear layers with BatchNorm between them and no other nonlinearity; `bias` of the linear layers."""

    def __init__(self, bias, affine):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 5, bias=bias), nn.BatchNorm1d(5, affine=affine)
        self.second, self.last = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.second(self.norm(self.first(x))))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batchnorms_are_taken_into_what_is_mixed(bias, affine):
    """Two networks of one function, set differently: exact, since nothing but linear maps is left."""
    torch.manual_seed(0)
    net, x = Normalised(bias, affine).double(), torch.randn(300, 6, dtype=torch.double)
    net(3 * x + 1)
    if affine:
        nn.init.normal_(net.norm.weight)
    twin, q = copy.deepcopy(net).eval(), orthogonal(4, 3)
    net.eval()
    with torch.no_grad():
        twin.second.weight.copy_(q @ net.second.weight)
        twin.second.bias.copy_(q @ net.second.bias)
        twin.last.weight.copy_(net.last.weight @ q.T)
        shift = torch.tensor([2.0, 0.5, -1.0, 3.0, -0.5]).double()  # of the norm's inputs, in scale and sign
        twin.first.weight.mul_(shift[:, None])
        twin.norm.running_mean.mul_(shift)
        if bias:
            twin.first.bias.mul_(shift)
        signs = shift.sign() * (shift.square() * (twin.norm.running_var + twin.norm.eps)).sqrt()
        twin.norm.running_var.copy_(signs.square() - twin.norm.eps)
        twin.second.weight.mul_(shift.sign())
    close(twin(x), net(x))
    first, other = fxzip.compile_zip(net, twin, x, data=[x], method="cca", refit=None)(x)
    close(first, net(x), atol=1e-9, rtol=1e-9)
    close(other, net(x), atol=1e-5, rtol=1e-5)


def test_statistics_may_be_estimated_anew_behind_a_batchnorm_that_was_mixed():
    """With independent features g is their deviation, so a BatchNorm reset gives the same network again."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x = torch.randn(400, 4, dtype=torch.double)
    x = torch.linalg.qr(x - x.mean(0))[0] * 20  # uncorrelated
    with torch.no_grad():
        net[0].weight.copy_(orthogonal(4, 1))
        net[1].momentum = None
        net(x)
    net[1].running_var.mul_(399 / 400)
    net.eval()
    zipped = fxzip.compile_zip(net, copy.deepcopy(net), x, data=[x], method=CCA(), refit=None)
    reset = fxzip.compile_zip(net, copy.deepcopy(net), x, data=[x], method=CCA(), refit="batchnorm")
    close(zipped(x)[0], net(x), atol=1e-9, rtol=1e-9)
    close(reset(x)[0], net(x), atol=2e-2, rtol=0)


def test_where_only_relabellings_are_legal_features_are_permuted():
    statistics = observed(4, 4)
    free, bound = CCA().match(
        Problem((Space((4, 4), moments=statistics), Space((4, 4), "relabel only", moments=statistics)))
    )
    assert not free.bijective(1)
    assert bound.bijective(1)


def test_shares_of_means_are_row_sums_and_of_maps_equal():
    clusters = Merge.from_clusters(torch.tensor([0, 1, 1, 1]), sizes=(2, 2))
    close(shares(clusters, 0), torch.tensor([1, 1 / 3]).double())
    close(shares(clusters, 1), torch.tensor([0, 2 / 3]).double())
    mapped = CCA()(observed(3, 3, 3))
    assert not is_mean(mapped)
    close(shares(mapped, 2), torch.full((3,), 1 / 3).double())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: CCA(ridge=-1),
            fxzip.OptionError,
            "`CCA` needs a finite ridge >= 0; got ridge=-1. The default is 0.1.",
        ),
        (
            lambda: CCA()(observed(3, 4), 3),
            fxzip.InputError,
            r"needs as many in all: 3 and no other number; got widths \[3, 4\] and `size` 3. Use `method=\"zip\"`",
        ),
        (lambda: CCA()(observed(3, 3), 2), fxzip.InputError, r"got widths \[3, 3\] and `size` 2"),
        (
            lambda: CCA()(moments([torch.zeros(0, 2), torch.zeros(0, 2)])),
            fxzip.DataError,
            "`cca` needs observed features; these moments hold 0 positions",
        ),
        (
            lambda: CCA()(moments([torch.full((3, 2), float("nan"))] * 2)),
            fxzip.DataError,
            "`cca` needs finite moments; some covariances are not",
        ),
        (
            lambda: CCA(ridge=0)(moments([torch.randn(2, 5), torch.randn(2, 5)])),
            fxzip.DataError,
            r"`CCA\(ridge=0\)` needs covariances of full rank; the features of a space span fewer than their 5 dim",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()
