"""REPAIR and the BatchNorm reset against their definitions."""

import copy

import pytest
import torch
from models import randomise, with_statistics_of
from models.networks import Block, Residual
from torch import Tensor, nn

import fxzip
from fxzip.refit import repair, reset_batchnorm
from fxzip.refit.least_squares.ridge import Regression, ridge_solution
from fxzip.tracing.calls import as_call

close = torch.testing.assert_close


def images(count, seed):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def zipped_of(*models, data, method="zip", until=None):
    """The zipped module before any refit, and its plan."""
    programs = [fxzip.tracing.trace(model, data[0][:2]) for model in models]
    labellings = [fxzip.analysis.label(program, fxzip.RULES) for program in programs]
    trunk = fxzip.partition.find_trunk(fxzip.partition.align(programs), labellings, until=until)
    plan = fxzip.rewriting.plan(trunk, fxzip.calibration.observe(trunk, calls(data)), fxzip.matching.resolve(method))
    return fxzip.rewriting.rewrite(plan), plan


def calls(data):
    return [as_call(batch) for batch in data]


def outputs(model, names, data):
    """Mean and standard deviation per feature of what modules return, over all batches."""
    caught = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, y, name=name: caught.setdefault(name, []).append(y.detach().clone())
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for hook in hooks:
        hook.remove()
    joint = {name: torch.cat(ys).movedim(1, -1).flatten(0, -2) for name, ys in caught.items()}
    return {name: (y.mean(0), y.std(0, correction=0)) for name, y in joint.items()}


LAYERS = {  # layer that is rescaled -> a parameter with an entry per feature that it gives
    "stem.1": "stem.0.weight",
    "layer1.0.bn1": "layer1.0.conv1.weight",
    "layer1.1.bn2": "stem.0.weight",
    "layer2.0.bn1": "layer2.0.conv1.weight",
    "layer2.0.down.1": "layer2.0.down.0.weight",
    "layer2.1.bn2": "layer2.0.down.0.weight",
}


@pytest.fixture(scope="module")
def models():
    return randomise(Residual(4), 1).double(), randomise(Residual(5), 2).double()


def goals(models, plan, layers, data):
    """Σ_k M_k of the means and standard deviations that layers have in the originals."""
    number = {space.name: n for n, space in enumerate(plan.trunk.spaces[0].spaces)}
    seen = [outputs(model, layers, data) for model in models]
    return {
        layer: tuple(
            sum(plan.merges[number[space]].M(k) @ own[layer][which] for k, own in enumerate(seen)) for which in (0, 1)
        )
        for layer, space in layers.items()
    }


def repaired_equals_goal(models, data, layers, refit):
    zipped, plan = zipped_of(*models, data=data)
    after = refit(zipped, plan, calls(data))
    found = outputs(after, [f"trunk.{layer}" for layer in layers], data)
    for layer, (mean, std) in goals(models, plan, layers, data).items():
        close(found[f"trunk.{layer}"][0], mean, rtol=1e-7, atol=1e-8)
        close(found[f"trunk.{layer}"][1], std, rtol=1e-7, atol=1e-8)


def test_merged_features_get_the_mean_and_deviation_of_their_members(models):
    """Jordan et al., section 4: on one batch all layers at once, since each sees inputs that are corrected."""
    repaired_equals_goal(models, [images(16, 1)], LAYERS, repair)


def test_over_several_batches_the_first_layer_is_exact(models):
    data = [images(8, seed) * scale + shift for seed, scale, shift in ((1, 1, 0), (2, 2, 1), (3, 0.5, -1))]
    repaired_equals_goal(models, data, {"stem.1": LAYERS["stem.1"]}, repair)


def test_without_repair_they_do_not_have_it(models):
    """A test of the test."""
    with pytest.raises(AssertionError):
        repaired_equals_goal(models, [images(16, 1)], LAYERS, lambda zipped, plan, data: zipped)


def values_of(model, layer, data):
    """What a module returns over all batches, [positions, channels]."""
    caught = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _, __, y: caught.append(y.detach().clone()))
    with torch.no_grad():
        for batch in data:
            model(batch)
    hook.remove()
    return torch.cat(caught).movedim(1, -1).flatten(0, -2)


@pytest.mark.parametrize("inner", [fxzip.Zip(), fxzip.Permute()], ids=lambda m: m.name)
@pytest.mark.parametrize("batches", [1, 3])
def test_features_that_are_unmerged_by_a_matrix_get_the_deviation_of_their_mixture(models, inner, batches):
    data = [images(16, seed) + seed for seed in range(1, 1 + batches)]
    zipped, plan = zipped_of(*models, data=data, method=fxzip.baselines.Recover(inner))
    assert all(merge.labels() is None for merge in plan.merges.values())
    after = repair(zipped, plan, calls(data))
    number = {space.name: n for n, space in enumerate(plan.trunk.spaces[0].spaces)}
    exact = LAYERS if batches == 1 else {"stem.1": LAYERS["stem.1"]}  # over several batches the first layer is
    for layer, space in exact.items():
        M = [plan.merges[number[space]].M(k) for k in range(2)]
        mixed = sum(values_of(model, layer, data) @ own.T for model, own in zip(models, M, strict=True))
        found = values_of(after, f"trunk.{layer}", data)
        close(found.mean(0), mixed.mean(0), rtol=1e-7, atol=1e-8)
        close(found.std(0), mixed.std(0), rtol=1e-7, atol=1e-8)
        members = sum(values_of(model, layer, data).std(0) @ own.T for model, own in zip(models, M, strict=True))
        assert not torch.allclose(mixed.std(0), members, rtol=1e-2)


def test_linear_calls_without_a_batchnorm_are_rescaled_themselves():
    a, b = (
        randomise(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7, bias=False), nn.Tanh(), nn.Linear(7, n)), n)
        for n in (3, 4)
    )
    data = [torch.randn(50, 6, dtype=torch.float64)]
    repaired_equals_goal((a.double(), b.double()), data, {"0": "0.weight", "2": "2.weight"}, repair)


def test_batchnorms_of_heads_get_what_they_give_in_their_own_networks(models):
    data = [images(16, 1)]
    zipped, plan = zipped_of(*models, data=data, until="layer1")
    after, names = repair(zipped, plan, calls(data)), ["layer2.0.bn1", "layer2.1.bn1", "layer2.1.bn2"]
    for k, model in enumerate(models):
        found = outputs(after, [f"head_{k}.{name}" for name in names], data)
        for name, (mean, std) in outputs(model, names, data).items():
            close(found[f"head_{k}.{name}"][0], mean, rtol=1e-7, atol=1e-8)
            close(found[f"head_{k}.{name}"][1], std, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("refit", [repair, reset_batchnorm])
def test_the_zipped_module_that_goes_in_stays_as_it_is(models, refit):
    data = [images(8, 1)]
    zipped, plan = zipped_of(*models, data=data)
    before = copy.deepcopy(zipped.state_dict())
    after = refit(zipped, plan, calls(data))
    assert all(torch.equal(value, before[name]) for name, value in zipped.state_dict().items())
    assert not after.training
    assert not any(module.training for module in after.modules())
    assert any(not torch.equal(value, before[name]) for name, value in after.state_dict().items())


def test_a_feature_that_never_varies_is_only_shifted(models):
    a, b = (copy.deepcopy(model) for model in models)
    with torch.no_grad():
        for model in (a, b):
            model.stem[1].weight[2] = 0.0
    data = [images(8, 1)]
    zipped, plan = zipped_of(a, b, data=data, method="average")
    after = repair(zipped, plan, calls(data))
    (mean, std) = outputs(after, ["trunk.stem.1"], data)["trunk.stem.1"]
    close(mean[2], (a.stem[1].bias[2] + b.stem[1].bias[2]).detach() / 2)
    assert std[2] == 0
    assert all(bool(value.isfinite().all()) for value in after.state_dict().values())


def test_reset_is_the_cumulative_average_of_torch(models):
    data = [images(8, seed) for seed in (1, 2, 3)]
    zipped, plan = zipped_of(*models, data=data)
    expected = with_statistics_of(zipped, data)
    found = reset_batchnorm(zipped, plan, calls(data))
    for (name, value), wanted in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), name
    assert found.get_submodule("trunk.stem.1").num_batches_tracked == 3
    momenta = {module.momentum for module in found.modules() if isinstance(module, nn.BatchNorm2d)}
    assert momenta == {0.1}


def test_reset_statistics_of_the_first_layer_by_hand(models):
    data = [images(8, seed) + seed for seed in (1, 2)]
    zipped, plan = zipped_of(*models, data=data)
    norm = reset_batchnorm(zipped, plan, calls(data)).get_submodule("trunk.stem.1")
    seen = [zipped.get_submodule("trunk.stem.0")(batch).detach().transpose(0, 1).flatten(1) for batch in data]
    close(norm.running_mean, torch.stack([y.mean(1) for y in seen]).mean(0))
    close(norm.running_var, torch.stack([y.var(1) for y in seen]).mean(0))


def test_reset_leaves_alone_what_keeps_no_statistics():
    class Untracked(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.stem[1] = nn.BatchNorm2d(8, track_running_stats=False)

    data = [images(8, 1)]
    zipped, plan = zipped_of(*(randomise(Untracked(), seed).double() for seed in (1, 2)), data=data)
    after = reset_batchnorm(zipped, plan, calls(data))
    assert after.get_submodule("trunk.stem.1").running_mean is None
    assert after.get_submodule("trunk.layer1.0.bn1").num_batches_tracked == 1


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def test_reset_without_a_batchnorm_changes_nothing():
    data = [torch.randn(20, 4)]
    zipped, plan = zipped_of(randomise(Plain(), 1), randomise(Plain(), 2), data=data)
    after = reset_batchnorm(zipped, plan, calls(data))
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in zipped.state_dict().items())


class Late:
    """Data whose second batch has a NaN when it is read again, after the observation."""

    def __init__(self, *batches: Tensor) -> None:
        self.batches, self.reads = batches, 0

    def __iter__(self):
        self.reads += 1
        for number, batch in enumerate(self.batches):
            broken = batch.clone()
            if number == 1 and self.reads > 2:
                broken[0, 1] = float("nan")
            yield broken


@pytest.mark.parametrize(("refit", "node"), [
    ("repair", "`stem_1` of model 0 gave 8"), ("batchnorm", "`stem_0` of the zipped network gave 8"),
    ("lstsq", "`stem_0` of the originals gave 8"),
])  # fmt: skip
def test_features_that_are_not_finite_during_the_refit_are_named(models, refit, node):
    data = Late(images(8, 1), images(8, 2), images(8, 3))
    with pytest.raises(fxzip.DataError, match=rf"^Features must be finite; node {node}.* on batch 1 of `data`\."):
        fxzip.compile_zip(*models, images(2, 0), data=data, refit=refit, hold_out=False, progress=False)


def test_a_gram_matrix_that_overflows_is_named():
    """Once an endless loop: no ridge makes infinity positive definite."""
    x = torch.full((4, 3), 1e30)
    with pytest.raises(fxzip.DataError, match=(
        r"^The inputs of a regression must have a finite Gram matrix; that of 3 inputs overflows. Zip the models in a "
    )):  # fmt: skip
        ridge_solution(Regression(x, x, torch.zeros(4, 3)), 1e-4)


def test_repair_names_the_zipped_network_where_only_that_overflows(models):
    data = [images(8, 1)]
    zipped, plan = zipped_of(*models, data=data)
    with torch.no_grad():
        zipped.get_submodule("trunk.layer1.0.bn1").weight[3] = float("inf")
    with pytest.raises(fxzip.DataError, match=(
        "node `layer1_0_bn1` of the zipped network gave 1 non-finite features on batch 0 of `data`"
    )):  # fmt: skip
        repair(zipped, plan, calls(data))


def test_a_block_zipped_with_itself_needs_no_repair():
    net = randomise(nn.Sequential(nn.Conv2d(3, 6, 1), Block(6, 6), nn.Flatten(), nn.Linear(384, 2)), 3).double()
    data = [images(8, 1), images(8, 2)]
    zipped, plan = zipped_of(net, net, data=data, method="permute")
    after = repair(zipped, plan, calls(data))
    for name, value in zipped.state_dict().items():
        close(after.state_dict()[name], value, rtol=1e-9, atol=1e-9)
