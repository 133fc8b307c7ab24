"""What comes out is an ordinary module; what goes in stays as it was."""

import copy
import io
import json
import pickle

import pytest
import torch
from models import randomise
from models.networks import Residual
from torch import nn

import fxzip
from fxzip.analysis import relative_difference
from fxzip.tracing.calls import leaves

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pair():
    return randomise(Residual(4), 1), randomise(Residual(5), 2)


@pytest.fixture(scope="module")
def zipped(pair):
    return fxzip.compile_zip(*pair, X, data=[X, X + 1], until="layer2.0", progress=False)


def same(found, expected, bound=1e-6):
    assert relative_difference(expected, found) <= bound


def test_state_dict(zipped):
    other = copy.deepcopy(zipped)
    with torch.no_grad():
        for value in other.parameters():
            value.zero_()
    other.load_state_dict(zipped.state_dict())
    same(other(X), zipped(X))


def test_copy_keeps_the_report(zipped):
    other = copy.deepcopy(zipped)
    assert isinstance(other, fxzip.ZippedModule)
    assert other.report["flops"] == zipped.report["flops"]
    same(other(X), zipped(X))


def test_pickle(zipped):
    file = io.BytesIO()
    torch.save(zipped, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    same(other(X), zipped(X))
    same(other.single(1)(X), zipped(X)[1])
    assert str(other.report) == str(zipped.report)


def pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("settings", [
    {"method": fxzip.baselines.Recover(fxzip.Zip()), "until": "layer1"}, {"start": "layer1", "until": "layer2.0"},
    {"data": fxzip.PerModel([X, -X], [X + 1, X + 2]), "joint": True},
], ids=["matrix", "merge", "joint"])  # fmt: skip
def test_pickle_what_is_called_of_our_own(pair, settings):
    """What the graph calls is not looked into."""
    zipped = fxzip.compile_zip(*pair, X, **{"data": [X], "refit": None, "progress": False, **settings})
    assert any(str(getattr(node.target, "__module__", "")).startswith("fxzip") for node in zipped.graph.nodes)
    for module, other in ((zipped, pickled(zipped)), (zipped.single(1), pickled(zipped.single(1)))):
        assert len(other.graph.nodes) == len(module.graph.nodes)
        same(other(X), module(X))


class Sliced(nn.Module):
    """Computes what does not depend on the input, and calls functions of every kind."""

    def __init__(self, classes):
        super().__init__()
        self.register_buffer("places", torch.arange(12))
        self.embed, self.inner, self.last = nn.Embedding(12, 6), nn.Linear(6, 6), nn.Linear(6, classes)

    def forward(self, x):
        h = self.inner(x) + self.embed(self.places[:5])
        h = torch.relu(h) * nn.functional.gelu(h, approximate="tanh") + torch.ops.aten.tanh.default(h)
        h = torch.where(h > 0, h, 0.1 * h).to(torch.float32)[..., ::2].repeat_interleave(2, -1)
        return {"logits": self.last(h.mean(dim=1)), "size": h.shape[1:]}


def test_pickle_keeps_the_graph_as_it_is():
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    models = [randomise(Sliced(n), n) for n in (2, 3)]
    for network in (fxzip.side_by_side(models, x), fxzip.compile_zip(models, x, refit=None, progress=False)):
        for module in (network, network.single(0)):
            other = pickled(module)
            lines = [[(n.op, n.name, n.target, str(n.args), n.kwargs) for n in m.graph.nodes] for m in (module, other)]
            assert lines[0] == lines[1]
            same(leaves(other(x)), leaves(module(x)))


def test_modes_and_persistence_survive(pair, zipped):
    whole = copy.deepcopy(zipped).train()
    frozen = next(name for name, module in whole.named_modules() if isinstance(module, nn.BatchNorm2d))
    whole.get_submodule(frozen).eval()
    whole.register_buffer("scratch", torch.zeros(1), persistent=False)
    modes = {name: module.training for name, module in whole.named_modules()}
    for other in (pickled(whole), whole):
        assert {name: module.training for name, module in other.named_modules()} == modes
        assert other.state_dict().keys() == zipped.state_dict().keys()
        assert not other.single(0).get_submodule(frozen).training


def test_dtype(zipped):
    same(copy.deepcopy(zipped).double()(X.double())[0].float(), zipped(X)[0], 1e-4)


def test_other_batch_sizes(zipped):
    whole = zipped(X)
    for part in (zipped(X[:1]), zipped(X[:4])):
        same(part, [y[: len(part[0])] for y in whole], 1e-4)


def test_training(pair, zipped):
    assert not zipped.training
    tuned = copy.deepcopy(zipped).train()
    sum(y.square().mean() for y in tuned(X)).backward()
    assert {name for name, p in tuned.named_parameters() if p.grad is None} == set()
    assert all(p.requires_grad for p in tuned.parameters())


def test_frozen_parameters_stay_frozen(pair):
    a, b = (copy.deepcopy(model) for model in pair)
    for model in (a, b):
        model.stem.requires_grad_(False)
    names = dict(fxzip.compile_zip(a, b, X, progress=False).named_parameters())
    assert not names["trunk.stem.0.weight"].requires_grad
    assert names["trunk.layer1.0.conv1.weight"].requires_grad


def test_single(zipped):
    for i, whole in enumerate(zipped(X)):
        alone = zipped.single(i)
        same(alone(X), whole)
        assert all(node.users or node.op in ("output", "placeholder") for node in alone.graph.nodes)
        assert not any(name.startswith(f"head_{1 - i}") for name, _ in alone.named_parameters())
    same(zipped.single(-1)(X), zipped(X)[1])
    with pytest.raises(IndexError, match=r"`single` takes the number of a head, 0 to 1; found 2\."):
        zipped.single(2)


def test_zipped_again(pair):
    model = randomise(Residual())
    first = fxzip.compile_zip(model, fxzip.relabel(model, X), X, data=[X], progress=False)
    second = fxzip.compile_zip(first, fxzip.relabel(first, X), X, data=[X], progress=False)
    same(second(X), (first(X), first(X)), 1e-4)


def test_export(zipped):
    program = torch.export.export(zipped, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    same(program.module()(X[:3]), [y[:3] for y in zipped(X)], 1e-5)


@pytest.mark.slow
def test_torch_compile(zipped):
    same(torch.compile(zipped)(X), zipped(X), 1e-4)


def test_inputs_are_not_touched(pair):
    a, b = (copy.deepcopy(model) for model in pair)
    a.train()
    b.layer1.train()
    calls = []
    a.register_forward_pre_hook(lambda *_: calls.append(1))
    before = [copy.deepcopy(model.state_dict()) for model in (a, b)]
    modes = [[m.training for m in model.modules()] for model in (a, b)]
    sample, random = X.clone(), torch.get_rng_state()
    zipped = fxzip.compile_zip(a, b, X, data=[X], progress=False)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(sample, X)
    assert modes == [[m.training for m in model.modules()] for model in (a, b)]
    assert len(a._forward_pre_hooks) == 1
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    own = {p.data_ptr() for model in (a, b) for p in model.parameters()}
    assert not own & {p.data_ptr() for p in zipped.parameters()}


def test_sample_of_one(pair):
    zipped = fxzip.compile_zip(*pair, X[:1], data=[X], progress=False)
    assert [len(y) for y in zipped(X)] == [6, 6]


@pytest.mark.parametrize("refit", [None, "batchnorm", "repair"])
@pytest.mark.thinned(2)
def test_refits(pair, refit):
    zipped = fxzip.compile_zip(*pair, X, data=iter([X, X + 1]), refit=refit, progress=False)
    assert all(bool(y.isfinite().all()) for y in zipped(X))
    assert zipped.report["refit"] == refit


@pytest.mark.thinned(3)
@pytest.mark.parametrize("data", [
    [X, X], [(X, torch.zeros(6))], ([X], [X + 1]), [[X], [X + 1]], fxzip.PerModel([X], [(X, 1)]), X,
    torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, torch.zeros(6)), batch_size=2),
])  # fmt: skip
def test_data_comes_in_many_forms(pair, data):
    assert len(fxzip.compile_zip(*pair, X, data=data, progress=False)(X)) == 2


def test_one_shot_data_is_read_once(pair):
    seen = []

    def batches():
        for shift in range(3):
            seen.append(shift)
            yield X + shift

    fxzip.compile_zip(*pair, X, data=batches(), progress=False)
    assert seen == [0, 1, 2]


def test_report(pair, zipped):
    report = zipped.report
    for what in ("flops", "parameters"):
        costs = report[what]
        assert costs["total"] == costs["trunk"] + sum(costs["heads"])
        assert costs["side_by_side"] == sum(costs["originals"])
    total = sum(p.numel() for p in zipped.parameters())
    assert report["parameters"]["total"] == total
    assert report["parameters"]["originals"] == [sum(p.numel() for p in m.parameters()) for m in pair]
    assert json.loads(json.dumps(report.as_dict()))["models"] == 2
    text = str(report)
    for word in ("trunk ends after", "flops", "free", "layer1.0.conv1.weight"):
        assert word in text
    assert all(0 <= space["correlation"] <= 1 for space in report["spaces"])
    assert not [s for s in fxzip.compile_zip(*pair, X, progress=False).report["notes"] if "far too little" not in s]


def test_fractions_share_no_more_than_asked(pair):
    shares = []
    for fraction in (0.3, 0.6, 1.0):
        flops = fxzip.compile_zip(*pair, X, until=fraction, verify=False, progress=False).report["flops"]
        shares.append(flops["trunk"] / flops["originals"][0])
        assert shares[-1] <= fraction
    assert shares == sorted(shares)
    assert shares[-1] > 0.95


def test_inspect(pair):
    found = fxzip.inspect(pair[0], X)
    assert {space.legality for space in found.spaces} == {"free"}
    assert "layer2.0" in found.cuts
    assert found.error < 1e-6
    assert "layer1.0.conv1.weight" in str(found)


def test_inspect_has_a_graph(pair):
    graph = fxzip.inspect(pair[0], X).graph
    (number,) = {v[1] for v, _ in graph.in_edges(("node", "layer1_0_relu")) if v[0] == "space"}
    kinds = {kind for _, _, kind in graph.in_edges(("space", number), data="kind")}
    assert kinds == {"writes"}
    read = {w[1] for _, w, kind in graph.out_edges(("space", number), data="kind") if kind == "read"}
    assert read == {"layer1.0.conv2.weight"}


class Parametrised(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.first(x).relu())


def test_parametrised_twin():
    model, x = Parametrised(), torch.randn(50, 4)
    same(fxzip.compile_zip(model, fxzip.relabel(model, x), x, data=[x], progress=False)(x)[1], model(x), 1e-4)


def test_relus_write_in_place_only_where_nothing_else_reads() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.alone, self.shared = nn.ReLU(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.alone(self.first(x))
            y = self.again(x)
            return self.head(self.shared(y) - y)

    a, b, x = Reads().eval(), Reads().eval(), torch.randn(16, 4)
    zipped = fxzip.compile_zip(a, a, x, data=[x], method="permute")
    flags = {name.split(".")[-1]: m.inplace for name, m in zipped.named_modules() if isinstance(m, nn.ReLU)}
    assert flags == {"alone": True, "shared": False}
    before = x.clone()
    torch.testing.assert_close(zipped(x)[0], a(x))
    assert torch.equal(x, before)
    sum(y.sum() for y in fxzip.compile_zip(a, b, x)(x)).backward()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("refit", [None, "batchnorm", "repair", "lstsq"])
def test_models_that_write_into_their_input_leave_the_data_alone(refit):
    """And each model sees the data as it is, not as another has left it."""

    class Writes(Residual):
        def forward(self, x):
            x[:, 0] *= 0.5
            return super().forward(x)

    class Copies(Residual):
        def forward(self, x):
            x = x.clone()
            x[:, 0] *= 0.5
            return super().forward(x)

    data = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for kind in (Writes, Copies):
        given = data.clone()
        a, b = (randomise(kind(), seed).double() for seed in (1, 2))
        zipped = fxzip.compile_zip(a, b, given[:2].clone(), data=[given], refit=refit, progress=False)
        torch.testing.assert_close(given, data, rtol=0, atol=0)
        found.append(zipped(data.clone()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


ROWS, MASK = torch.ones(16, 6), torch.ones(16, 1)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x, mask=None, *, scale=1.0):
        hidden = torch.relu(self.a(x)) * scale
        return self.b(hidden if mask is None else hidden * mask)


@pytest.mark.parametrize(
    ("sample", "args", "kwargs", "message"),
    [
        ((ROWS, MASK), (ROWS,), {}, r"held, `\(x, mask\)`; `mask` is missing\. What is missing must be passed"),
        ((ROWS, MASK), (ROWS, MASK, MASK), {}, r"`\(x, mask\)`; there are 3 by position"),
        ((ROWS, MASK), (ROWS, MASK), {"scale": 2.0}, r"`\(x, mask\)`; `scale` is not among it"),
        ((ROWS, MASK), (ROWS, MASK), {"mask": MASK}, r"`\(x, mask\)`; `mask` is given twice"),
        ((ROWS,), (ROWS,), {"mask": MASK}, r"`\(x\)`; `mask` is not among it.*compile with a `sample_input`"),
        ({"x": ROWS, "scale": 2.0}, (), {"x": ROWS}, r"`\(x, scale\)`; `scale` is missing"),
    ],
)
def test_calls_of_another_form_say_what_the_network_takes(sample, args, kwargs, message):
    torch.manual_seed(0)
    zipped = fxzip.compile_zip(Optional().eval(), Optional().eval(), sample, progress=False)
    for network in (zipped, zipped.single(0), pickle.loads(pickle.dumps(zipped)), copy.deepcopy(zipped)):
        with pytest.raises(fxzip.InputError, match=message):
            network(*args, **kwargs)


def test_errors_of_the_network_itself_stay():
    torch.manual_seed(0)
    zipped = fxzip.compile_zip(Optional().eval(), Optional().eval(), ROWS, progress=False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        zipped(ROWS[:, :3])
    with pytest.raises(TypeError, match="linear"):
        zipped("text")


def test_torch_script():
    torch.manual_seed(0)
    zipped = fxzip.compile_zip(Optional().eval(), Optional().eval(), ROWS, progress=False)
    torch.testing.assert_close(torch.jit.script(zipped)(ROWS), zipped(ROWS))
