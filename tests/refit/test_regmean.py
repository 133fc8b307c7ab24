"""RegMean against its formula, and against a case solved by hand."""

import pytest
import torch
from models import randomise
from models.networks import Residual
from torch import nn

import fxzip

G = torch.Generator().manual_seed(0)


def pair(make):
    return randomise(make(), 1).double(), randomise(make(), 2).double()


def formula(grams, weights, alpha):
    """The closed form of the paper, weights [inputs, outputs]."""
    shrunk = [alpha * g + (1 - alpha) * torch.diag(g.diagonal()) for g in grams]
    return torch.linalg.solve(sum(shrunk), sum(g @ w for g, w in zip(shrunk, weights, strict=True)))


def test_a_case_solved_by_hand():
    """Model a sees inputs along the first axis only, x = (2, 0), b along both, x = (1, 0) and (0, 1).
    G_a = diag(4, 0), G_b = diag(1, 1); W_a = (1, 1), W_b = (6, 3): W* = ((4·1 + 1·6) / 5, (0·1 + 1·3) / 1) = (2, 3)."""

    class One(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.first, self.last = nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)
            self.first.weight.data = torch.tensor([weight])

        def forward(self, x):
            return self.last(self.first(x))

    a, b = One([1.0, 1.0]).double(), One([6.0, 3.0]).double()
    data = fxzip.PerModel([torch.tensor([[2.0, 0.0]])], [torch.eye(2)])
    zipped = fxzip.compile_zip(a, b, torch.ones(2, 2).double(), data=data, method="average", refit="regmean",
                               verify=False, progress=False)  # fmt: skip
    weight = dict(zipped.named_parameters())["trunk.first.weight"]
    torch.testing.assert_close(weight.detach(), torch.tensor([[2.0, 3.0]]).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("per_model", [False, True])
def test_linear_calls_are_those_of_the_formula(alpha, per_model):
    a, b = pair(lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)))
    x, y = torch.randn(40, 5, generator=G).double(), 2 * torch.randn(30, 5, generator=G).double()
    data = fxzip.PerModel([x], [y]) if per_model else [x, y]
    seen = (x, y) if per_model else (torch.cat([x, y]),) * 2
    zipped = fxzip.compile_zip(
        a, b, x, data=data, method="average", refit=fxzip.baselines.RegMean(alpha), hold_out=False, progress=False
    )
    found = dict(zipped.named_parameters())
    for depth in (0, 2):
        inputs = [model[:depth](own) for model, own in zip((a, b), seen, strict=True)]
        wanted = formula([i.T @ i for i in inputs], [model[depth].weight.T for model in (a, b)], alpha)
        torch.testing.assert_close(found[f"trunk.{depth}.weight"], wanted.T, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found[f"trunk.{depth}.bias"], (a[depth].bias + b[depth].bias) / 2)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_by_their_patches(groups):
    def make():
        return nn.Sequential(
            nn.Conv2d(4, 6, 3, 2, 1, groups=groups), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 16, 3)
        )  # fmt: skip

    a, b = pair(make)
    x = torch.randn(20, 4, 8, 8, generator=G).double()
    zipped = fxzip.compile_zip(a, b, x, data=[x], method="average", refit="regmean", hold_out=False, progress=False)
    unfolded = nn.functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 36)
    for g in range(groups):
        own = unfolded.reshape(-1, groups, 36 // groups)[:, g]
        rows = slice(g * 6 // groups, (g + 1) * 6 // groups)
        weights = [model[0].weight[rows].flatten(1).T for model in (a, b)]
        wanted = formula([own.T @ own] * 2, weights, 0.9).T
        found = dict(zipped.named_parameters())["trunk.0.weight"][rows].flatten(1)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_a_twin_is_left_as_it_is():
    """With permutations in front, both networks are one, and RegMean of a network with itself is that network."""
    model, x = randomise(Residual(4), 1).double(), torch.randn(30, 3, 8, 8, generator=G).double()
    twin = fxzip.relabel(model, x)
    zipped = fxzip.compile_zip(model, twin, x, data=[x], method="permute", refit="regmean", progress=False)
    torch.testing.assert_close(zipped(x), (model(x), model(x)), rtol=1e-6, atol=1e-8)


def test_inputs_that_are_always_zero_keep_the_mean():
    a, b = pair(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    x = torch.randn(20, 3, generator=G).double() * torch.tensor([1.0, 0.0, 1.0])
    zipped = fxzip.compile_zip(a, b, x, data=[x], method="average", refit="regmean", hold_out=False, progress=False)
    weight = dict(zipped.named_parameters())["trunk.0.weight"]
    torch.testing.assert_close(weight[:, 1], (a[0].weight + b[0].weight)[:, 1] / 2)


def test_features_must_be_paired():
    widths = iter((8, 11))
    a, b = pair(lambda: nn.Sequential(nn.Linear(3, n := next(widths)), nn.Tanh(), nn.Linear(n, 2)))
    x = torch.randn(20, 3, generator=G).double()
    with pytest.raises(fxzip.InputError, match=r"`RegMean` needs features that are paired one to one; the method does "
                                               r"not in 1 of 1 spaces, first in that of `0.weight`\."):  # fmt: skip
        fxzip.compile_zip(a, b, x, data=[x], method="permute", refit="regmean", progress=False)
    with pytest.raises(fxzip.OptionError, match="`RegMean` needs 0 <= alpha <= 1; found alpha=2"):
        fxzip.baselines.RegMean(2)
