"""One network made cheaper by itself."""

import copy

import pytest
import torch
from models import randomise
from models.networks import Residual
from torch import nn

import fxzip

X = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)).double()


def mlp(outputs=3, width=16, seed=0):
    layers = nn.Sequential(
        nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )
    return randomise(layers, seed).double()


def doubled(model):
    """The same function with every hidden feature twice, and half the weight on each copy."""
    result = copy.deepcopy(model)
    for place, layer in enumerate(layer for layer in result if isinstance(layer, nn.Linear)):
        weight, bias = layer.weight.detach(), layer.bias.detach()
        if place:
            weight = torch.cat([weight, weight], 1) / 2
        if place < 2:
            weight, bias = torch.cat([weight, weight]), torch.cat([bias, bias])
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        layer.out_features, layer.in_features = weight.shape
    return result


def relative(found, wanted):
    return float(((found - wanted).norm() / wanted.norm()).detach())


def test_what_is_there_twice_goes_without_loss():
    """The oracle: a network with every feature twice is that without at a cost of little over a quarter."""
    model = mlp()
    wide = doubled(model)
    assert relative(wide(X), model(X)) < 1e-12
    cost = sum(layer.weight.numel() for layer in model[::2]) / sum(layer.weight.numel() for layer in wide[::2])
    narrowed = fxzip.narrow(wide, X[:4], data=[X], max_cost=cost * 1.01, budget="flops", progress=False)
    assert relative(narrowed(X), model(X)) < 1e-3
    assert narrowed.report.cost <= cost * 1.01
    assert {space["kept"] for space in narrowed.report["spaces"]} == {16}


@pytest.mark.parametrize("cost", [1.0, 0.5])
def test_the_result_is_an_ordinary_network(cost, tmp_path):
    model, x = randomise(Residual(5), 1), torch.randn(100, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    narrowed = fxzip.narrow(model, x[:4], data=[x], max_cost=cost, budget="flops", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert 0.9 * cost < narrowed.report.cost <= cost
    assert narrowed.report.headline.startswith(f"one network, narrowed: {narrowed.report.cost:.2f}x the FLOPs; ")
    assert narrowed.report.headline.endswith(" of 10 held-out inputs")
    assert relative(narrowed(x), model(x)) < (1e-5 if cost == 1 else 0.5)
    narrowed.save_pretrained(tmp_path / "narrow")
    assert torch.equal(fxzip.load(tmp_path / "narrow")(x), narrowed(x))
    narrowed.train()(x).sum().backward()


def test_narrowing_is_better_than_leaving_weights_out():
    """Against the same widths with the largest weights kept, the rest cut off."""
    model = mlp(width=32)
    narrowed = fxzip.narrow(model, X[:4], data=[X[:200]], max_cost=0.5, budget="flops", progress=False)
    cut = copy.deepcopy(model)
    kept = [space["kept"] for space in narrowed.report["spaces"]]
    layers = [layer for layer in cut if isinstance(layer, nn.Linear)]
    for number, size in enumerate(kept):
        writer, reader = layers[number], layers[number + 1]
        best = writer.weight.detach().norm(dim=1).topk(size).indices
        writer.weight, writer.bias = nn.Parameter(writer.weight[best]), nn.Parameter(writer.bias[best])
        reader.weight = nn.Parameter(reader.weight[:, best])
    assert relative(narrowed(X[200:]), model(X[200:])) < 0.5 * relative(cut(X[200:]), model(X[200:]))


def test_networks_narrowed_apart_stand_in_the_table():
    models = [mlp(3, seed=0), mlp(4, seed=1)]
    table = fxzip.compare(models, X[:4], data=[X], methods=["zip", "alone"], budget="flops", progress=False)
    row = table[2]
    assert (row["method"], row["refit"], row["error"]) == ("alone", "lstsq", None)
    assert 0.8 < row["cost"] <= 1.001
    assert table[0]["cost"] == pytest.approx(2, abs=0.2)
    assert 0.5 < row["agreement"] <= 1


@pytest.mark.parametrize(
    ("cost", "error"), [(0.0, fxzip.OptionError), (-1, fxzip.OptionError), (1e-6, fxzip.CostError)]
)
def test_costs_out_of_reach(cost, error):
    with pytest.raises(error, match="max_cost"):
        fxzip.narrow(mlp(), X[:4], data=[X], max_cost=cost, budget="flops", progress=False)


def test_mistakes():
    with pytest.raises(fxzip.InputError, match="`narrow` takes one model and `sample_input`"):
        fxzip.narrow(mlp(), mlp())
    with pytest.raises(fxzip.InputError):
        fxzip.narrow([mlp(), mlp()], X[:4])


class Enlarging(nn.Module):
    """Two convolutions and a transposed one, as networks for larger images end."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.last = nn.ConvTranspose2d(16, 3, 4, 2, 3)

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())


class Reshaped(nn.Module):
    """Logits behind a change of shape, and their softmax."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(64, 5)

    def forward(self, x):
        h = self.second(self.first(x).relu()).relu()
        return self.last(h[..., :2, :2].flatten(1)).softmax(1)


class OneMap(nn.Module):
    """A single feature for each place: what is returned lies in no space."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 1, 1)

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())[:, 0]


@pytest.mark.parametrize(("kind", "within"), [(Reshaped, 1.001), (OneMap, 1.01), (Enlarging, 1.2)])
def test_what_the_network_returns_is_fitted_too(kind, within):
    """No other weights of the last call would be nearer, on the inputs that it was fitted to; of a transposed
    convolution least squares knows no border. There are so many inputs that the ridge is the least."""
    model = randomise(kind(), 2).double()
    x = torch.randn(64 * fxzip.LeastSquares().scarce + 1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    options = {"verify": False, "max_cost": 0.4, "budget": "flops", "hold_out": False, "progress": False}
    narrowed = fxzip.narrow(model, x[:4], data=[x], **options)
    assert not any("left as zipped" in note for note in narrowed.report["notes"])

    (name,) = [name for name, _ in narrowed.named_modules() if name.endswith("last")]
    layers = {"original": model.last, "narrowed": narrowed.get_submodule(name)}
    inputs, outputs = {}, {}
    for which, layer in layers.items():
        layer.register_forward_hook(
            lambda _, args, out, which=which: inputs.update({which: args[0]}) or outputs.update({which: out})
        )
    with torch.no_grad():
        model(x)
        narrowed(x)
    wanted, found = outputs["original"], outputs["narrowed"]

    best = copy.deepcopy(layers["narrowed"])
    best._forward_hooks.clear()
    optimizer = torch.optim.LBFGS(best.parameters(), max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = (best(inputs["narrowed"]) - wanted).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert float((found - wanted).square().mean()) < within * float(loss().detach())
