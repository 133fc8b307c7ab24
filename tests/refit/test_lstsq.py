"""The least-squares refit: regressions, inputs of linear calls at places, and what it does to a zip."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

import fxzip
from fxzip.refit.least_squares import ridge as ridge_module
from fxzip.refit.least_squares.ridge import Regression, _outer, affine_solution, best_ridge, ridge_solution
from fxzip.refit.linear_calls.kernels import effective, install, sampled_places, take
from fxzip.refit.linear_calls.parameter_uses import survey
from fxzip.tracing.calls import Call


def test_ridge_is_least_squares_where_lambda_vanishes() -> None:
    x, t = torch.randn(60, 5, dtype=torch.float64), torch.randn(60, 3, dtype=torch.float64)
    found, *_ = ridge_solution(Regression(x, t, torch.zeros(6, 3)), 0.0)
    wanted = torch.linalg.lstsq(torch.cat([x, torch.ones(60, 1, dtype=torch.float64)], 1), t).solution
    torch.testing.assert_close(found, wanted)


def test_ridge_goes_to_the_prior_where_lambda_is_large() -> None:
    x, t, prior = torch.randn(60, 5), torch.randn(60, 3), torch.randn(6, 3)
    found, *_ = ridge_solution(Regression(x, t, prior), 1e12)
    torch.testing.assert_close(found, prior.double(), atol=1e-6, rtol=1e-6)


def test_products_of_positions_that_are_made_in_blocks_are_all_products() -> None:
    x = torch.randn(600, 700)
    torch.testing.assert_close(_outer(x), x.double() @ x.double().T, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("positions", [1, 29, 30, 31, 300])
@pytest.mark.parametrize("constant", [False, True])
def test_fewer_positions_than_inputs_give_what_the_normal_equations_give(constant, positions, dtype) -> None:
    """Which matrix is factorised, d × d or positions × positions, is a matter of time alone."""
    generator = torch.Generator().manual_seed(positions)
    d, scale = 30 - constant, torch.logspace(-2, 2, 30 - constant)
    x, t = torch.randn(positions, d, generator=generator) * scale, torch.randn(positions, 2, generator=generator)
    prior = torch.randn(30, 2, generator=generator)
    found, ridge, *_ = ridge_solution(Regression(x.to(dtype), t.to(dtype), prior, constant=constant), 1e-3)
    ones = torch.cat([x, torch.ones(positions, 1)], 1).double() if constant else x.double()
    gram = ones.T @ ones
    regular = gram + 1e-3 * gram.diagonal().mean() * torch.eye(30, dtype=torch.float64)
    wanted = prior + torch.linalg.solve(regular, ones.T @ (t - ones @ prior.double()))
    assert ridge == 1e-3
    bound = 1e-9 if dtype == torch.float64 else 1e-4  # sums lie on a grid of 2⁻⁴² of their greatest entry
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)


def test_rank_deficient_inputs_raise_the_ridge_and_still_fit() -> None:
    x = torch.randn(40, 1).repeat(1, 6)
    t = 2 * x[:, :1] + 1
    found, ridge, *_ = ridge_solution(Regression(x, t, torch.zeros(7, 1)), 0.0)
    assert ridge > 0
    torch.testing.assert_close(x @ found[:-1].float() + found[-1].float(), t, atol=1e-3, rtol=1e-3)


def _one_sided_error(x: Tensor, t: Tensor, offset: Tensor, solution: Tensor) -> float:
    y = x.double() @ solution[:-1] + solution[-1] + offset.double()
    wanted = (t + offset).double()
    return float(torch.where(wanted > 0, y - wanted, y.clamp(min=0)).square().sum())


def test_rounds_lower_the_error_behind_a_relu() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=generator)
    t = torch.randn(500, 8, generator=generator) + x @ torch.randn(4, 8, generator=generator)
    offset = torch.randn(500, 8, generator=generator)
    errors = [
        _one_sided_error(x, t, offset, ridge_solution(Regression(x, t, torch.zeros(5, 8), offset), 1e-12, rounds=n)[0])
        for n in (0, 1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


def test_affine_solution_recovers_scale_and_shift_and_leaves_dead_features() -> None:
    y = torch.randn(50, 3, dtype=torch.float64)
    y[:, 2] = 4.0
    scale, shift = affine_solution(y, torch.stack([2 * y[:, 0] - 1, -y[:, 1], y[:, 2] + 1], 1), 0.0)
    torch.testing.assert_close(scale, torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(shift, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))


LINEAR = {
    "linear": (nn.Linear(4, 6), (5, 3, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (2, 4, 11)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 4, 7, 8)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 7, 8)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (2, 4, 5, 5)),
    "same": (nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (2, 4, 9, 8)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 6, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=2, padding=1), (2, 2, 4, 5, 6)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, groups=2), (2, 4, 5, 4)),
    "transposed dilated": (nn.ConvTranspose2d(2, 3, 3, dilation=2, bias=False), (1, 2, 4, 4)),
}


def kernel_of(module: nn.Module, x: Tensor):
    """The kernel of the one linear call that a module makes."""
    net = fx.symbolic_trace(nn.Sequential(module))
    (found,) = (use.kernel for use in survey(net, Call((x,), {})).uses if use.kernel is not None)
    return found


@pytest.mark.parametrize("name", LINEAR)
def test_patches_times_weight_is_the_call(name: str) -> None:
    module, shape = LINEAR[name]
    module = module.double()
    x = torch.randn(*shape, dtype=torch.float64)
    x, y = (x, module(x)) if name != "linear" else (x.flatten(0, -2), module(x.flatten(0, -2)))
    kernel = kernel_of(module, x)
    places = sampled_places(y.shape, kernel.axes, 50, torch.Generator().manual_seed(0), y.device)
    flat, bias = effective(kernel, None)
    found = torch.einsum("pgd,gnd->pgn", kernel.patches(x, places), flat).flatten(1) + bias
    torch.testing.assert_close(found, take(y, kernel.axes, places))


@pytest.mark.parametrize("name", LINEAR)
def test_install_writes_what_effective_reads(name: str) -> None:
    module, shape = LINEAR[name]
    module, x = module.double(), torch.randn(*shape, dtype=torch.float64)
    kernel = kernel_of(module, x)
    flat, bias = (torch.randn_like(v) for v in effective(kernel, None))
    bias = bias if kernel.bias is not None else torch.zeros_like(bias)
    with torch.no_grad():
        install(kernel, None, flat, bias)
    for found, wanted in zip(effective(kernel_of(module, x), None), (flat, bias), strict=True):
        torch.testing.assert_close(found, wanted)


def test_install_makes_the_batchnorm_the_identity() -> None:
    conv, norm = nn.Conv2d(3, 5, 3).double(), nn.BatchNorm2d(5).double().eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    wanted = norm(conv(x))
    with torch.no_grad():
        install(kernel_of(conv, x), norm, *effective(kernel_of(conv, x), norm))
    torch.testing.assert_close(norm(conv(x)), wanted)
    torch.testing.assert_close(norm.running_mean, torch.zeros(5, dtype=torch.float64))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, classes: int, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.GroupNorm(1, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.norm(self.stem(x)))).mean((2, 3)))


def _net(seed: int, classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    net = Net(classes).eval()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.ndim == 1:
                tensor.copy_(
                    torch.rand_like(tensor) + 0.5 if "var" in name or "weight" in name else tensor.normal_(0, 0.3)
                )
    return net


def _data(count: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(count)]


def test_a_network_zipped_with_itself_stays_itself() -> None:
    net = _net(0).double()
    data = [batch.double() for batch in _data()]
    zipped = fxzip.compile_zip(net, net, data[0][:2], data=data, method="permute", refit="lstsq")
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for head in zipped(x):
        torch.testing.assert_close(head, net(x), atol=1e-9, rtol=1e-9)


def test_held_out_error_is_far_below_that_of_repair() -> None:
    a, b, x = _net(0), _net(1), _data(2, seed=9)
    errors = {}
    for refit in ("repair", "lstsq"):
        zipped = fxzip.compile_zip(a, b, x[0][:2], data=_data(), refit=refit)
        heads = [torch.cat([zipped(batch)[k] for batch in x]) for k in range(2)]
        wanted = [torch.cat([net(batch) for batch in x]) for net in (a, b)]
        gaps = [((h - w).square().mean() / w.var()).item() for h, w in zip(heads, wanted, strict=True)]
        errors[refit] = sum(gaps)
    assert errors["lstsq"] < 0.5 * errors["repair"]


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("seed", [8, 57])
def test_the_best_ridge_is_that_of_both_halves(seed: int, rectified: bool) -> None:
    """Either half alone would choose another one, with one of the seeds."""
    generator = torch.Generator().manual_seed(seed)
    x, t = (torch.randn(60, n, generator=generator, dtype=torch.float64) for n in (40, 3))
    t = t + x[:, :3]
    prior, held, offset = torch.zeros(41, 3), torch.arange(60) % 2 == 0, torch.full((60, 3), 0.2, dtype=torch.float64)
    ridges = [1e-3, 1e-1, 10.0, 1e4]
    errors = []
    for ridge in ridges:
        total = 0.0
        for mine in (held, ~held):
            found, *_ = ridge_solution(Regression(x[mine], t[mine], prior), ridge)
            wrong = torch.cat([x[~mine], torch.ones(30, 1, dtype=torch.float64)], 1) @ found - t[~mine]
            if rectified:
                wrong = torch.where(t[~mine] + 0.2 > 0, wrong, (wrong + t[~mine] + 0.2).clamp(min=0))
            total += float(wrong.square().sum())
        errors.append(total)
    best = best_ridge(Regression(x, t, prior, offset), ridges, held, rectified=rectified)
    assert best == ridges[errors.index(min(errors))]
    assert best not in (ridges[0], ridges[-1])


def test_no_ridge_is_tried_behind_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them takes two factorisations, which are most of the time of large systems."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 40, generator=generator, dtype=torch.float64)
    tried, factor = list[float](), ridge_module._Normal.factor
    monkeypatch.setattr(ridge_module._Normal, "factor", lambda self, own: (tried.append(own), factor(self, own))[1])
    exact = Regression(x, x @ torch.ones(40, 200).double(), torch.zeros(41, 200))
    assert best_ridge(exact, [1e-4, 1e-2, 1.0, 1e2], torch.arange(120) % 2 == 0) == 1e-4
    assert tried == [1e-4, 1e-4, 1e-2, 1e-2]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("batches", [1, 2])
def test_with_few_positions_the_ridge_is_chosen(batches: int) -> None:
    """On inputs that were not fitted the heads are nearer to their networks than with the ridge as given."""
    [x] = _data(1, seed=9)
    few = list(torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(5)).chunk(batches))
    errors = {0: 0.0, 16: 0.0}
    for seed in range(3):
        nets = _net(2 * seed), _net(2 * seed + 1)
        for scarce in errors:
            refit = fxzip.LeastSquares(scarce=scarce)
            zipped = fxzip.compile_zip(*nets, x[:2], data=few, method=fxzip.Zip(0.1, 0.5), refit=refit, hold_out=False)
            with torch.no_grad():
                errors[scarce] += sum(
                    float((y - net(x)).square().sum()) for y, net in zip(zipped(x), nets, strict=True)
                )
    assert errors[16] < 0.8 * errors[0]


def test_all_of_a_head_is_fitted() -> None:
    """What lies behind the first linear call of a head repairs what that leaves."""
    nets, x = [_net(0), _net(1)], _data(2, seed=9)
    zipped = fxzip.compile_zip(*nets, x[0][:2], data=_data(), until="blocks.0", refit="lstsq")
    for k, net in enumerate(nets):

        def error(module: nn.Module) -> float:
            return sum(float((module(batch)[k] - net(batch)).square().sum()) for batch in x)  # noqa: B023

        fitted = error(zipped)
        for last in ("blocks.1.conv2.weight", "head.weight"):
            back = copy.deepcopy(zipped)
            [name] = [name for name, _ in back.named_parameters() if f"head_{k}" in name and name.endswith(last)]
            with torch.no_grad():
                back.get_parameter(name).copy_(net.get_parameter(last))
            assert not torch.equal(back.get_parameter(name), zipped.get_parameter(name))
            assert fitted < error(back)


def test_sources_per_model_and_one_source_differ() -> None:
    a, b, data = _net(0), _net(1), _data()
    per_model = fxzip.compile_zip(a, b, data[0][:2], data=fxzip.PerModel(data[:3], data[3:]), refit="lstsq")
    mixed = fxzip.compile_zip(a, b, data[0][:2], data=data, refit="lstsq")
    x = data[0]
    assert not torch.allclose(per_model(x)[0], mixed(x)[0], atol=1e-3)


def test_memory_bounds_no_data_and_the_report_says_what_was_done() -> None:
    a, b, data = _net(0), _net(1), _data()
    zipped = fxzip.compile_zip(a, b, data[0][:2], data=data, refit=fxzip.LeastSquares(memory=1))
    assert any("bound on memory" in note for note in zipped.report["notes"])
    whole = fxzip.compile_zip(a, b, data[0][:2], data=data, refit=fxzip.LeastSquares(memory=1 << 40))
    assert not any("bound on memory" in note for note in whole.report["notes"])
    assert torch.equal(zipped(data[0])[0], whole(data[0])[0])


def test_report_counts_the_fitted_calls() -> None:
    a, b, data = _net(0, 3), _net(1, 5), _data(2)
    zipped = fxzip.compile_zip(a, b, data[0][:2], data=data, refit="lstsq")
    assert "least squares fitted 8 calls" in zipped.report["notes"]


@pytest.mark.parametrize(("settings", "message"), [
    ({"ridge": -1e-4}, "^`LeastSquares` needs `ridge` >= 0; got ridge=-0.0001. The default is 0.0001.$"),
    ({"positions": 0}, "^`LeastSquares` needs `positions` >= 1; got positions=0. The default is 20.$"),
    ({"memory": "2GB"}, "^`LeastSquares` needs `memory` >= 1; got memory='2GB'. The default is None.$"),
    ({"memory": 0}, "^`LeastSquares` needs `memory` >= 1; got memory=0. The default is None.$"),
])  # fmt: skip
def test_settings_out_of_range(settings, message) -> None:
    with pytest.raises(fxzip.OptionError, match=message):
        fxzip.LeastSquares(**settings)
