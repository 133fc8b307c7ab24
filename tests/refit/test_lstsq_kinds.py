"""Every kind of linear call and of scale: the refit's solution against a direct one of the whole least-squares problem.

A linear call is linear in its parameters, so its Jacobian with respect to them, over all inputs, is the design matrix;
no knowledge of kernels, groups or strides goes into it. Method "average" makes the target the mean of the originals.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

import fxzip
from fxzip.refit.least_squares import samples

RIDGE = 1e-3
FIT = fxzip.LeastSquares(ridge=RIDGE, scarce=0, least=10**9, turns=0)


def direct(call: nn.Module, inputs: list[Tensor], target: Tensor, groups: int = 1) -> dict[str, Tensor]:
    """argmin Σ ‖call(x) - t‖² + λ ‖θ - θ_0‖² over the parameters of a call, λ per group, by numpy's lstsq."""
    start = {name: value.detach() for name, value in call.named_parameters()}

    def out(params: dict[str, Tensor]) -> Tensor:
        return torch.cat([functional_call(call, params, (x,)).reshape(-1) for x in inputs])

    jacobian = jacrev(out)(start)
    design = torch.cat([jacobian[name].flatten(1) for name in start], 1).numpy()
    theta = torch.cat([value.reshape(-1) for value in start.values()]).numpy()
    outputs = np.concatenate([np.arange(v.numel()) // (v.numel() // groups) for v in start.values()])  # their group
    diagonal = np.square(design).sum(0)
    penalty = np.zeros_like(theta)
    for g in range(groups):
        penalty[outputs == g] = np.sqrt(RIDGE * diagonal[outputs == g].mean())
    rest = target.reshape(-1).numpy() - design @ theta
    rows = np.concatenate([design, np.diag(penalty)])
    solved = theta + np.linalg.lstsq(rows, np.concatenate([rest, np.zeros_like(theta)]), rcond=None)[0]
    parts = torch.from_numpy(solved).split([value.numel() for value in start.values()])
    return {name: part.reshape(value.shape) for (name, value), part in zip(start.items(), parts, strict=True)}


class Functional(nn.Module):
    """A call with parameters that the model holds itself."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        shape = {"linear": (6, 4), "conv1d": (6, 4, 3), "packed": (6, 4)}.get(kind, (4, 6))
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(6)) if kind not in ("matmul", "einsum") else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "linear":
            return F.linear(x, self.weight, self.bias)
        if self.kind == "conv1d":
            return F.conv1d(x, self.weight, self.bias, padding=1)
        if self.kind == "einsum":
            return torch.einsum("btc,cd->btd", x, self.weight)
        if self.kind == "addmm":
            return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


class Net(nn.Module):
    """A first call, so that inputs are merged features, then the call in question, then a head."""

    def __init__(self, first: nn.Module, call: nn.Module, classes: int, times: int = 1) -> None:
        super().__init__()
        self.first, self.call, self.times = first, call, times
        self.head = nn.LazyLinear(classes)

    def inputs(self, x: Tensor) -> list[Tensor]:
        """What the call reads, each time."""
        found = [torch.tanh(self.first(x))]
        for _ in range(self.times - 1):
            found.append(torch.tanh(self.call(found[-1])))
        return found

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for _ in range(self.times):
            x = torch.tanh(self.call(x))
        return self.head(x.flatten(1))


def pair(first, call, x, times=1):
    """Two networks of the same kind, similar enough for groups to be paired in order."""
    torch.manual_seed(0)
    nets = [Net(first(), call(), 2 + k, times).double().eval() for k in range(2)]
    for net in nets:
        net(x)
    with torch.no_grad():
        for param in nets[0].parameters():
            param.uniform_(-0.7, 0.7)
        for (name, param), own in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
            own.uniform_(-0.4, 0.4)
            if not name.startswith("head"):
                own += param
    return nets


def merged(nets, x, refit):
    """The zip, and a network of the first's class with the parameters of its trunk."""
    zipped = fxzip.compile_zip(*nets, x[:2], data=[x], method="average", refit=refit, hold_out=False, progress=False)
    net = copy.deepcopy(nets[0])
    own = {name.removeprefix("trunk."): value for name, value in zipped.state_dict().items()}
    net.load_state_dict({k: v for k, v in own.items() if k in net.state_dict()}, strict=False)
    for name, value in own.items():
        if name.endswith("call.bias") and net.call.bias is None:
            net.call.bias = nn.Parameter(value)
    return zipped, net


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


LINEAR = {  # the call in question, the one in front, the input, groups
    "linear": (lambda: nn.Linear(4, 6), lambda: nn.Linear(3, 4), random(9, 5, 3), 1),
    "conv1d dilated": (lambda: nn.Conv1d(4, 6, 3, dilation=2, padding=1), lambda: nn.Conv1d(3, 4, 1),
                       random(9, 3, 8), 1),
    "conv2d strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), lambda: nn.Conv2d(3, 4, 1),
                       random(9, 3, 6, 5), 1),
    "conv2d circular": (lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), lambda: nn.Conv2d(3, 4, 1),
                        random(9, 3, 5, 4), 1),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.Conv2d(3, 4, 1), random(19, 3, 6, 5), 2),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), lambda: nn.Conv2d(3, 4, 1), random(9, 3, 6, 5), 4),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), lambda: nn.Conv3d(2, 3, 1), random(9, 2, 3, 4, 3), 1),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 5, 3, stride=2), lambda: nn.Conv1d(3, 4, 1), random(9, 3, 5), 1),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 5, 3, stride=2, padding=1, output_padding=1),
                      lambda: nn.Conv2d(3, 4, 1), random(5, 3, 4, 3), 1),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), lambda: nn.Conv2d(3, 4, 1),
                           random(19, 3, 4, 3), 2),
    "transposed 3d": (lambda: nn.ConvTranspose3d(3, 4, 2), lambda: nn.Conv3d(2, 3, 1), random(5, 2, 2, 3, 2), 1),
    "F.linear": (lambda: Functional("linear"), lambda: nn.Linear(3, 4), random(9, 5, 3), 1),
    "F.conv1d": (lambda: Functional("conv1d"), lambda: nn.Conv1d(3, 4, 1), random(9, 3, 8), 1),
    "matmul": (lambda: Functional("matmul"), lambda: nn.Linear(3, 4), random(9, 5, 3), 1),
    "matmul and add": (lambda: Functional("matmul add"), lambda: nn.Linear(3, 4), random(9, 5, 3), 1),
    "addmm": (lambda: Functional("addmm"), lambda: nn.Linear(3, 4), random(9, 5, 3), 1),
    "einsum": (lambda: Functional("einsum"), lambda: nn.Linear(3, 4), random(9, 5, 3), 1),
}  # fmt: skip


def check(zipped, before, after, nets, x, groups=1):
    inputs = before.inputs(x)
    seen = [net.inputs(x) for net in nets]
    target = torch.cat([(nets[0].call(a) + nets[1].call(b)).reshape(-1) / 2 for a, b in zip(*seen, strict=True)])
    wanted = direct(before.call, [own.detach() for own in inputs], target.detach(), groups)
    moved = 0.0
    for name, value in wanted.items():
        found = after.call.get_parameter(name).detach()
        torch.testing.assert_close(found, value, rtol=1e-8, atol=1e-8)
        moved = max(moved, (found - before.call.get_parameter(name)).abs().max().item())
    assert moved > 1e-3  # the zipped weights were not the solution already
    assert "call" not in {name.split()[0] for name in zipped.meta["fxzip_fit"].left}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kind", LINEAR)
def test_linear_calls_get_the_direct_solution(kind: str) -> None:
    call, first, x, groups = LINEAR[kind]
    nets = pair(first, call, x)
    _, before = merged(nets, x, None)
    zipped, after = merged(nets, x, FIT)
    check(zipped, before, after, nets, x, groups)


@pytest.mark.parametrize(
    "kind", ["linear", "conv2d grouped", "transposed 2d", "transposed grouped", "F.linear", "matmul and add", "einsum"]
)
def test_twins_stay_exact(kind: str) -> None:
    call, first, x, _ = LINEAR[kind]
    net = pair(first, call, x)[0]
    zipped = fxzip.compile_zip(net, net, x[:2], data=[x], method="permute", refit=FIT, hold_out=False, progress=False)
    for head in zipped(x):
        torch.testing.assert_close(head, net(x), rtol=1e-10, atol=1e-10)


def test_a_module_called_twice_gets_one_solution_for_both_calls() -> None:
    x = random(9, 5, 3)
    nets = pair(lambda: nn.Linear(3, 4), lambda: nn.Linear(4, 4), x, times=2)
    _, before = merged(nets, x, None)
    zipped, after = merged(nets, x, FIT)
    check(zipped, before, after, nets, x)
    assert "least squares fitted 4 calls" in zipped.report["notes"]  # first, the call of two, and two heads


def test_a_linear_module_without_bias_gets_one() -> None:
    x = random(9, 5, 3)
    nets = pair(lambda: nn.Linear(3, 4), lambda: nn.Linear(4, 6, bias=False), x)
    _, before = merged(nets, x, None)
    before.call.bias = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    zipped, after = merged(nets, x, FIT)
    check(zipped, before, after, nets, x)


# Attention


class Attention(nn.Module):
    """Attention behind a first call, in a residual sum or not."""

    def __init__(self, classes: int, *, residual: bool, **options) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 8), nn.Linear(8, classes)
        self.attention, self.drop = nn.MultiheadAttention(8, 2, **options), nn.Dropout(0.5)
        self.residual = residual

    def inputs(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        y = self.drop(self.attention(x, x, x, need_weights=False)[0])
        return self.head(torch.tanh(x + y if self.residual else y).mean(1))


def core(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """What the output projection reads."""
    own = copy.deepcopy(attention)
    with torch.no_grad():
        own.out_proj.weight.copy_(torch.eye(8))
        if own.out_proj.bias is not None:
            own.out_proj.bias.zero_()
    return own(x, x, x, need_weights=False)[0].detach()


def projection(attention: nn.MultiheadAttention) -> nn.Linear:
    own = nn.Linear(8, 24, bias=attention.in_proj_bias is not None, dtype=torch.float64)
    own.weight = attention.in_proj_weight
    if attention.in_proj_bias is not None:
        own.bias = attention.in_proj_bias
    return own


def attentions(**options):
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = Attention(2 + seed, **options).double().eval()
        with torch.no_grad():
            for param in net.parameters():
                param.uniform_(-0.8, 0.8)
        nets.append(net)
    return nets


def merged_attention(nets, x, refit):
    zipped = fxzip.compile_zip(*nets, x[:2], data=[x], method="average", refit=refit, hold_out=False, progress=False)
    net = copy.deepcopy(nets[0])
    own = {name.removeprefix("trunk."): value for name, value in zipped.state_dict().items()}
    net.load_state_dict({k: v for k, v in own.items() if k in net.state_dict()}, strict=False)
    return zipped, net


@pytest.mark.thinned(3)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_attention_projections_get_the_direct_solution(batch_first: bool, bias: bool, residual: bool) -> None:
    x = random(16, 5, 3)
    nets = attentions(residual=residual, batch_first=batch_first, bias=bias)
    _, before = merged_attention(nets, x, None)
    zipped, after = merged_attention(nets, x, FIT)
    inputs, seen = before.inputs(x).detach(), [net.inputs(x).detach() for net in nets]
    target = sum(projection(net.attention)(own) for net, own in zip(nets, seen, strict=True)) / 2
    wanted = direct(projection(before.attention), [inputs], target.detach())
    torch.testing.assert_close(after.attention.in_proj_weight.detach(), wanted["weight"], rtol=1e-7, atol=1e-7)
    if bias:
        torch.testing.assert_close(after.attention.in_proj_bias.detach(), wanted["bias"], rtol=1e-7, atol=1e-7)
    outputs = [net.attention(own, own, own, need_weights=False)[0] for net, own in zip(nets, seen, strict=True)]
    target = sum(outputs) / 2
    if residual:  # the target of the sum, less what the other summand really carries
        target = target + sum(seen) / 2 - inputs
    wanted = direct(before.attention.out_proj, [core(after.attention, inputs)], target.detach())
    for name, value in wanted.items():
        found = after.attention.out_proj.get_parameter(name).detach()
        torch.testing.assert_close(found, value, rtol=1e-7, atol=1e-7)
    assert not any("left as zipped" in note for note in zipped.report["notes"])


def test_attention_with_projections_apart_is_fitted() -> None:
    x = random(16, 5, 3)

    class Cross(Attention):
        def __init__(self, classes: int) -> None:
            super().__init__(classes, residual=False, kdim=6, vdim=7, batch_first=True)
            self.keys, self.values = nn.Linear(3, 6), nn.Linear(3, 7)

        def forward(self, x: Tensor) -> Tensor:
            y, k, v = self.inputs(x), torch.tanh(self.keys(x)), torch.tanh(self.values(x))
            return self.head(torch.tanh(self.attention(y, k, v, need_weights=False)[0]).mean(1))

    nets = [Cross(2).double().eval(), Cross(3).double().eval()]
    zipped = fxzip.compile_zip(*nets, x[:2], data=[x], method="average", refit=FIT, hold_out=False, progress=False)
    fitted = zipped.meta["fxzip_fit"].fitted
    names = {name.split("attention.")[1].rstrip(")") for name in fitted if "attention." in name}
    assert names == {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}
    assert not any("left as zipped" in note for note in zipped.report["notes"])


# Residual sums behind moves and scales


class Branch(nn.Module):
    """A residual branch: linear call, a permutation of axes, a scale per feature, dropout, the sum."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Conv2d(3, 4, 1), nn.Linear(4, 7), nn.Linear(7, 4)
        self.scale, self.drop, self.head = nn.Parameter(torch.empty(4)), nn.Dropout(), nn.Linear(4, classes)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.first(x))
        return x, torch.tanh(self.up(x.permute(0, 2, 3, 1)))

    def total(self, x: Tensor) -> Tensor:
        x, y = self.hidden(x)
        return x + self.drop(self.scale * self.down(y)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.total(x)).mean((2, 3)))


def branches() -> list[nn.Module]:
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = Branch(2 + seed).double().eval()
        with torch.no_grad():
            for param in net.parameters():
                param.uniform_(0.2, 0.9)
        nets.append(net)
    return nets


def test_a_result_is_followed_to_its_sum_once_for_each_size_of_batch(monkeypatch) -> None:
    nets, x = branches(), random(48, 3, 4, 3)
    batches, followed, find = [*x[:40].split(10), x[40:44], x[44:]], [], samples.find_tail

    def each_time(net, env, *rest):
        found = find(net, env, *rest)
        if found is not None:
            followed.append(found.route.index.shape)
        return found if known else found and replace(found, route=replace(found.route, summand=None))

    monkeypatch.setattr(samples, "find_tail", each_time)
    results, times = [], []
    for known in (True, False):  # noqa: B007  read by `each_time`
        followed.clear()
        zipped = fxzip.compile_zip(*nets, x[:10], data=batches, refit=FIT, hold_out=False, progress=False)
        results.append(zipped.state_dict())
        shapes = [shape for shape in followed if shape[0] != 8]  # without the trial on a part of the sample
        times.append((shapes.count((10, 4, 4, 3)), shapes.count((4, 4, 4, 3))))
    assert times == [(2, 2), (8, 4)]  # the layer, and its scale
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_the_target_of_a_sum_is_found_through_moves_and_scales() -> None:
    x, nets = random(12, 3, 4, 3), branches()
    zipped, after = merged_attention(nets, x, FIT)
    _, before = merged_attention(nets, x, None)
    skip, inner = after.hidden(x)
    target = sum(net.total(x) for net in nets) / 2 - skip
    target = target.permute(0, 2, 3, 1) / before.scale
    wanted = direct(before.down, [inner.detach()], target.detach())
    for name, value in wanted.items():
        torch.testing.assert_close(after.down.get_parameter(name).detach(), value, rtol=1e-7, atol=1e-7)
    assert not any("left as zipped" in note for note in zipped.report["notes"])


# Scales and shifts


class RootMeanSquare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Shift(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x.square() + self.bias


SCALES = {
    "LayerNorm": (lambda: nn.LayerNorm(4), lambda: nn.Linear(3, 4), random(9, 5, 3)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(4, bias=False), lambda: nn.Linear(3, 4), random(9, 5, 3)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), lambda: nn.Conv2d(3, 4, 1), random(9, 3, 4, 3)),
    "BatchNorm": (lambda: nn.BatchNorm2d(4), lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh()), random(9, 3, 4, 3)),
    "RMSNorm": (lambda: nn.RMSNorm(4), lambda: nn.Linear(3, 4), random(9, 5, 3)),
    "RMSNorm by hand": (lambda: RootMeanSquare(4), lambda: nn.Linear(3, 4), random(9, 5, 3)),
    "shift": (lambda: Shift(4), lambda: nn.Linear(3, 4), random(9, 5, 3)),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("kind", SCALES)
def test_scales_and_shifts_get_the_direct_solution(kind: str) -> None:
    call, first, x = SCALES[kind]
    nets = pair(first, call, x)
    _, before = merged(nets, x, None)
    zipped, after = merged(nets, x, FIT)
    axis = 1 if "Group" in kind or "Batch" in kind else -1
    y = before.call(before.inputs(x)[0]).detach().movedim(axis, -1).reshape(-1, 4)
    target = sum(net.call(net.inputs(x)[0]) for net in nets).detach().movedim(axis, -1).reshape(-1, 4) / 2
    names = [name for name, _ in before.call.named_parameters()]
    for feature in range(4):
        columns = ([y[:, feature]] if "weight" in names else []) + ([torch.ones(len(y))] if "bias" in names else [])
        design = torch.stack([column.double() for column in columns], 1).numpy()
        fixed = 0 * y[:, feature] if "weight" in names else y[:, feature]
        own = y[:, feature] - y[:, feature].mean() if "bias" in names else y[:, feature]
        pull = np.zeros((1, design.shape[1]))
        if "weight" in names:
            pull[0, 0] = np.sqrt(RIDGE * own.square().sum().item())
        rows = np.concatenate([design, pull])
        wanted = np.concatenate([(target[:, feature] - fixed).numpy(), pull[0, :1]])
        solution = list(np.linalg.lstsq(rows, wanted, rcond=None)[0])
        scale = solution.pop(0) if "weight" in names else 1.0
        if "weight" in names:
            expected = before.call.weight[feature].item() * scale
            assert after.call.weight[feature].item() == pytest.approx(expected, rel=1e-8)
        if "bias" in names:
            expected = before.call.bias[feature].item() * scale + solution.pop(0)
            assert after.call.bias[feature].item() == pytest.approx(expected, rel=1e-8, abs=1e-10)
    assert not any("left as zipped" in note for note in zipped.report["notes"])


# What is left is named


class Left(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.weight, self.gain = (
            nn.Linear(3, 4),
            nn.Parameter(torch.rand(6, 4)),
            nn.Parameter(torch.rand(6, 1)),
        )
        self.table, self.head = nn.Parameter(torch.rand(5, 6)), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(torch.tanh(F.linear(x, self.weight * self.gain) + self.table).mean(1))


def test_what_is_left_is_named_with_the_reason() -> None:
    x = random(9, 5, 3)
    nets = [Left(2).double(), Left(3).double()]
    zipped = fxzip.compile_zip(*nets, x[:2], data=[x], method="average", refit=FIT, hold_out=False, progress=False)
    notes = zipped.report["notes"]
    assert any(
        "left as zipped, since `mm` is no linear call with a parameter as its weight: `linear`" in note
        for note in notes
    )
    assert any("left as zipped, since it has no parameter per feature: `add`" in note for note in notes)


class Tied(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed, self.out, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.Linear(7, classes)
        self.mix = nn.Linear(4, 4)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.out(torch.tanh(self.mix(self.embed(x))))).mean(1))


def test_a_weight_that_something_else_reads_is_left() -> None:
    x = torch.randint(7, (20, 5))
    nets = [Tied(2).double(), Tied(3).double()]
    zipped = fxzip.compile_zip(*nets, x[:2], data=[x], method="average", refit=FIT, hold_out=False, progress=False)
    assert any("since `embed` reads its parameters too: `out`" in note for note in zipped.report["notes"])
    assert torch.equal(zipped.trunk.embed.weight, sum(net.embed.weight for net in nets) / 2)


class HeadNorm(nn.Module):
    """A normalisation inside every head, with one scale for all heads; and one right behind a linear call."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 12), nn.LayerNorm(6)
        self.reduction, self.behind = nn.Linear(12, 8, bias=False), nn.LayerNorm(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x).view(-1, 2, 6))).flatten(1)
        return self.head(torch.tanh(self.behind(self.reduction(x))))


def test_shifts_of_normalisations_are_no_biases_of_the_call_in_front() -> None:
    """A twin must come out as it is; what several features share is named and left."""
    torch.manual_seed(0)
    net, x = HeadNorm(3).double().eval(), random(64, 4)
    with torch.no_grad():
        for param in net.parameters():
            param.uniform_(-1, 1)
    zipped = fxzip.compile_zip(
        net, fxzip.relabel(net, x[:2]), x[:2], data=[x], method="permute", hold_out=False, progress=False
    )
    for found in zipped(x):
        torch.testing.assert_close(found, net(x), rtol=1e-9, atol=1e-9)
    left = zipped.meta["fxzip_fit"].left
    assert left["norm"] == "several features share one parameter"
    assert "reduction" in zipped.meta["fxzip_fit"].fitted
