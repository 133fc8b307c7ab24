"""Observation: streamed moments against features caught by hooks."""

import importlib
from dataclasses import replace

import pytest
import torch
from models import randomise
from models.networks import Residual
from torch import Tensor, nn

import fxzip
from fxzip.calibration import hook_points as places
from fxzip.matching.moments import SAMPLES, Moments, moments
from fxzip.tracing.calls import as_call

module = importlib.import_module("fxzip.calibration.observer")
close = torch.testing.assert_close


def images(count, seed, size=8):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trunk_of(*models, sample, until=None):
    programs = [fxzip.tracing.trace(model, sample) for model in models]
    labellings = [fxzip.analysis.label(program, fxzip.RULES) for program in programs]
    return fxzip.partition.find_trunk(fxzip.partition.align(programs), labellings, until=until)


@pytest.fixture(scope="module")
def pair():
    return randomise(Residual(4), 1).double(), randomise(Residual(5, 12), 2).double()


@pytest.fixture(scope="module")
def trunk(pair):
    return trunk_of(*pair, sample=images(2, 0))


def observed(trunk, batches):
    found = fxzip.calibration.observe(trunk, [as_call(batch) for batch in batches])
    return {trunk.spaces[0].spaces[number].name: own for number, own in found.items()}


def inputs_of(model, names, batches):
    """What modules of a model read, [positions, channels], in the order of `names`."""
    caught = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: caught.setdefault(name, []).append(args[0].detach().clone())
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return torch.cat([x.movedim(1, -1).flatten(0, -2) for name in names for x in caught[name]])


READERS = {
    "stem.0.weight": ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.down.0"],
    "layer1.0.conv1.weight": ["layer1.0.conv2"],
    "layer1.1.conv1.weight": ["layer1.1.conv2"],
    "layer2.0.conv1.weight": ["layer2.0.conv2"],
    "layer2.0.down.0.weight": ["layer2.1.conv1", "linear"],  # the head takes the mean over the image
    "layer2.1.conv1.weight": ["layer2.1.conv2"],
}


def same(found: Moments, expected: Moments) -> None:
    assert found.sizes == expected.sizes
    assert found.count == expected.count
    close(found.total, expected.total, rtol=1e-10, atol=1e-9)
    close(found.outer, expected.outer, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("space", READERS)
def test_moments_are_those_of_what_the_readers_read(pair, trunk, space):
    batches = [images(3, 1), images(5, 2)]
    expected = moments([inputs_of(model, READERS[space], batches) for model in pair])
    same(observed(trunk, batches)[space], expected)


def test_every_space_is_observed(trunk):
    assert set(observed(trunk, [images(2, 1)])) == set(READERS) == {s.name for s in trunk.spaces[0].spaces}


def test_moments_do_not_depend_on_how_the_data_is_cut_into_batches(trunk):
    whole = images(12, 1)
    reference = observed(trunk, [whole])
    for parts in ([4, 4, 4], [1, 11], [1] * 12):
        for name, found in observed(trunk, whole.split(parts)).items():
            same(found, reference[name])


def test_moments_of_two_halves_of_the_data_add(trunk):
    first, second = [images(3, 1)], [images(4, 2)]
    whole, halves = observed(trunk, first + second), (observed(trunk, first), observed(trunk, second))
    for name, found in whole.items():
        same(halves[0][name] + halves[1][name], found)


def test_features_far_from_zero_lose_no_precision_in_float32():
    def shifted(seed):
        model = randomise(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), seed)
        with torch.no_grad():
            model[0].bias += 1000.0
        return model

    a, b, x = shifted(1), shifted(2), torch.randn(500, 4)
    found = observed(trunk_of(a, b, sample=x[:2]), x.split(100))["0.weight"]
    expected = moments([a.double()[0](x.double()), b.double()[0](x.double())])
    close(found.correlation, expected.correlation, rtol=0, atol=1e-4)


def test_the_models_own_order_of_features_is_kept(pair):
    model, x = pair[0], [images(4, 1)]
    twin = fxzip.relabel(model, images(2, 0), seed=3)
    found = observed(trunk_of(model, twin, sample=images(2, 0)), x)["layer1.0.conv1.weight"]
    same(found, moments([inputs_of(m, ["layer1.0.conv2"], x) for m in (model, twin)]))
    n = found.sizes[0]
    assert not torch.allclose(found.correlation[:n, n:].diagonal(), torch.ones(n, dtype=torch.float64), atol=0.1)
    close(found.correlation[:n, n:].max(1).values, torch.ones(n, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_positions_are_subsampled_evenly(pair, trunk, monkeypatch):
    monkeypatch.setattr(module, "POSITIONS", (64, 64))
    batches, space = [images(8, 1)], "layer1.0.conv1.weight"
    found = observed(trunk, batches)[space]
    assert found.count == 64
    rows = torch.arange(64) * (8 * 64) // 64
    same(found, moments([inputs_of(model, READERS[space], batches)[rows] for model in pair]))


def test_no_more_inputs_are_run_than_give_enough_positions(pair, trunk, monkeypatch):
    """But all of a batch with values that are not finite, so that they are found."""
    monkeypatch.setattr(module, "ENOUGH", (2, 100))
    steps, thinned = set(), module._thinned
    monkeypatch.setattr(module, "_thinned", lambda call, every: (steps.add(every), thinned(call, every))[1])
    batches = [as_call(images(16, 1)), as_call(images(16, 2))]
    few = fxzip.calibration.observe(trunk, batches, inputs=32)
    [step] = steps
    assert step > 1
    assert min(own.count for own in few.values()) >= 100
    thin = [thinned(call, step) for call in batches]
    assert [len(call.args[0]) for call in thin] == [-(-16 // step)] * 2
    wanted = fxzip.calibration.observe(trunk, thin)
    for space, own in few.items():
        same(own, wanted[space])
    batches[1].args[0][3] = torch.nan
    with pytest.raises(fxzip.DataError, match="batch 1"):
        fxzip.calibration.observe(trunk, batches, inputs=32)


def test_inputs_of_several_tasks_that_come_by_turns_are_observed_alike():
    batches = [torch.arange(100 * k, 100 * k + 20)[:, None] for k in range(30)]
    for every in (2, 4, 6):
        found = torch.cat([module._thinned(as_call(batch), every).args[0] for batch in batches])
        again = torch.cat([module._thinned(as_call(batch), every).args[0] for batch in batches])
        assert torch.equal(found, again)
        assert 0.3 < (found % 2).float().mean() < 0.7


@pytest.mark.parametrize("refit", ["lstsq", "repair"])
def test_all_inputs_are_run_where_no_least_squares_follow(pair, monkeypatch, refit):
    """They make the best of whatever features there are; ZipIt! with REPAIR is worse on few inputs."""
    monkeypatch.setattr(module, "ENOUGH", (1, 10))
    steps, thinned = set(), module._thinned
    monkeypatch.setattr(module, "_thinned", lambda call, every: (steps.add(every), thinned(call, every))[1])
    fxzip.compile_zip(*pair, images(2, 0), data=[images(40, 1)], refit=refit)
    assert bool(steps) == (refit == "lstsq")


def test_narrow_spaces_are_seen_at_more_positions_than_wide_ones():
    def count(features):
        index = torch.arange(features)[None]
        return module._positions(
            places.Watch(0, ("a", "b"), ("mm", 0), 0, (1,), (), ((features,), (features,)), (index, index))
        )

    least, most = module.POSITIONS
    counts = [count(n) for n in (8, 64, 256, 512, 2048, 8192)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == most
    assert counts[-1] == least


def test_samples_are_the_features_in_front_of_the_nonlinearity(pair, trunk):
    space, names = "layer1.0.conv1.weight", ["layer1.0.bn1"]
    batches = [images(4, seed) for seed in (1, 2, 3)]
    found = observed(trunk, batches)[space].samples
    assert len(found) == SAMPLES
    for part, batch in zip(found.split(SAMPLES // 2), batches, strict=False):
        close(part, torch.cat([inputs_of(model, names, [batch]) for model in pair], 1))


class Writing(nn.Module):
    """What one call reads, a later one writes over."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(y)
        y[:, :] = 0.0
        return self.third(z + y)


def test_features_are_taken_before_they_are_written_over():
    a, b, x = *(randomise(Writing(), seed).double() for seed in (1, 2)), torch.randn(40, 4, dtype=torch.float64)
    found = observed(trunk_of(a, b, sample=x[:2], until="second"), [x])
    read = moments([inputs_of(model, ["second"], [x]) for model in (a, b)])
    same(found["first.weight"], read + read)  # by `second`, and by the heads


@pytest.mark.parametrize("until", ["layer1", "layer2.0.conv1", "layer2.1.conv2"])
def test_what_the_trunk_hands_over_is_seen_whatever_the_cut(pair, until):
    trunk, batches = trunk_of(*pair, sample=images(2, 0), until=until), [images(6, 1)]
    inside = set(trunk.nodes)
    handed = [watch for watch in places.watches(trunk) if watch.call == places.VALUE]
    nodes = trunk.alignment.programs[0].module.graph.nodes
    crossing = {n.name for n in nodes if n.name in inside - {"x"} and any(u.name not in inside for u in n.users)}
    assert {watch.node[0] for watch in handed} == crossing != set()
    found = observed(trunk, batches)
    assert set(found) == {space.name for space in trunk.spaces[0].spaces}


def test_a_cut_changes_what_is_seen_of_a_stream_by_what_is_handed_over(pair):
    batches = [images(6, 1)]
    found = observed(trunk_of(*pair, sample=images(2, 0), until="layer1"), batches)["stem.0.weight"]
    values = []
    for model in pair:
        caught = inputs_of(model, ["layer1.0.conv1", "layer1.1.conv1"], batches)
        with torch.no_grad():
            last = model.layer1(model.stem(batches[0]))
        values.append(torch.cat([caught, last.movedim(1, -1).flatten(0, -2)]))
    same(found, moments(values))


def test_heads_of_attention_inside_a_leaf_module_are_observed():
    model = randomise(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)).double()
    net = nn.Sequential(nn.Linear(5, 16), model, nn.Linear(16, 3)).double().eval()
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    trunk = trunk_of(net, net, sample=x)
    found = fxzip.calibration.observe(trunk, [as_call(x)])
    assert set(found) == set(range(len(trunk.spaces[0].spaces)))
    assert {"free", "blockwise", "relabel only"} == {space.legality for space in trunk.spaces[0].spaces}
    for own in found.values():
        n = own.sizes[0]
        close(own.outer[:n, :n], own.outer[n:, n:])
        close(own.outer[:n, n:], own.outer[:n, :n])


def test_heads_do_not_run(pair, trunk):
    seen = []
    for program in trunk.alignment.programs:
        hook = program.module.get_submodule("linear").register_forward_pre_hook(lambda *_: seen.append(1))
        observed(trunk, [images(2, 1)])
        hook.remove()
    assert not seen


@pytest.mark.parametrize("model", [0, 1])
def test_features_that_are_not_finite_name_the_first_place_model_and_batch(trunk, model):
    weight = trunk.alignment.programs[model].module.get_submodule("layer1.0.bn1").weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[1:3] = float("inf")
    try:
        with pytest.raises(fxzip.DataError) as caught:
            observed(trunk, [images(2, 1)])
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert str(caught.value) == (
        f"Features must be finite; node `layer1_0_conv2` of model {model} gave 2 non-finite features on batch 0 of "
        "`data`. Look for overflow, or for NaN in the data or the parameters."
    )


def test_batches_that_the_models_reject_are_named(trunk):
    with pytest.raises(fxzip.DataError, match=(
        r"Batch 1 of `data` has shape \(2, 1, 8, 8\); the models were traced with \(2, 3, 8, 8\): "
    )):  # fmt: skip
        observed(trunk, [images(2, 1), images(2, 1)[:, :1]])


def test_an_oracle_that_sees_other_features_fails(pair, trunk):
    """A test of the test: the block's inputs are not what `conv2` reads."""
    batches = [images(3, 1)]
    wrong = moments([inputs_of(model, ["layer1.0.conv1"], batches) for model in pair])
    with pytest.raises(AssertionError):
        same(observed(trunk, batches)["layer1.0.conv1.weight"], wrong)


class TokenMixing(nn.Module):
    """Sums over places, channel by channel: the call sees batch and channels as one axis."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(2, 5, 1)
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 6)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head((x + self.second(torch.relu(self.first(x)))).mean(2))


def hidden_of(*models):
    """The moments of the space inside, on 16 images, and the images."""
    x = torch.randn(16, 2, 6, generator=torch.Generator().manual_seed(0)).double()
    return observed(trunk_of(*models, sample=x[:2]), [x])["first.weight"], x


def test_channels_are_averaged_out_image_by_image():
    """Their order differs from model to model, so pairs of channels are no evidence; each image still is."""
    models = [randomise(TokenMixing(), seed).double() for seed in range(2)]
    found, x = hidden_of(*models)
    joint = torch.cat([torch.relu(m.first(torch.relu(m.stem(x)))).mean(1).detach() for m in models], 1)
    assert found.count == 16
    close(found.covariance, torch.cov(joint.T, correction=0))


def test_of_one_model_every_channel_counts():
    assert hidden_of(randomise(TokenMixing()).double())[0].count == 16 * 5


def test_places_of_a_feature_among_others_are_averaged_whatever_the_order_of_these():
    """Four features of one kind and three of another along one axis, as rows and columns of a grid."""
    grid = torch.randn(5, 4, 3, dtype=torch.float64)
    index = torch.arange(12).reshape(4, 3).T  # [occurrences, features]
    watch = places.Watch(0, ("a",), ("mm", 0), -1, (1,), (), ((12,),), (index,), crossed=True)
    for columns in ([0, 1, 2], [2, 0, 1]):
        seen = module._features(grid[:, :, columns].flatten(1), watch, 0, positions=10)
        close(seen, grid.mean(2), rtol=0, atol=1e-15)
    apart = module._features(grid.flatten(1), replace(watch, crossed=False), 0, positions=10)
    close(apart, grid.movedim(2, 0).flatten(0, 1), rtol=0, atol=0)
