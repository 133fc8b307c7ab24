"""Weight matching: against brute force and the paper's own loop, on relabelled copies, and without any data."""

import itertools

import pytest
import torch
from models import randomise
from models.networks import Mixed, PaddedResNet, Residual, torchvision_model
from torch import nn
from torchvision.models import VisionTransformer

import fxzip
from fxzip.analysis import relative_difference
from fxzip.compiler.options import Options
from fxzip.compiler.survey import survey
from fxzip.matching import Problem, Run, Space, Weight, WeightMatching
from fxzip.matching.weights.descent import Descent
from fxzip.matching.weights.signatures import signature
from fxzip.matching.weights.weight_matching import agreement, begin, identity, match_weights
from fxzip.rewriting.zip_plan import plan
from fxzip.tracing.calls import as_call

close = torch.testing.assert_close
QUICK = ["squeezenet1_0", "mobilenet_v3_small", "shufflenet_v2_x1_0", "resnet18"]
HEAVY = ["resnet50", "densenet121", "resnext50_32x4d", "efficientnet_b0", "googlenet"]
LARGE = ["vgg16_bn", "alexnet", "convnext_tiny"]


class Listening:
    """A method of a user: matches as `WeightMatching` does, and keeps what it was shown."""

    name, needs = "listening", frozenset({"weights"})

    def match(self, problem):
        self.problem = problem
        return WeightMatching().match(problem)

    def relabelling(self):
        return self


def problem(*networks, sample):
    """What the method sees of these networks."""
    heard = Listening()
    plan(survey(networks, as_call(sample), Options(verify=False)).trunk(), {}, heard)
    return heard.problem


def mlp(*widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for n, m in itertools.pairwise(widths):
        layers += [nn.Linear(n, m), nn.ReLU()]
    net = nn.Sequential(*layers[:-1]).double()
    for tensor in net.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return net


def permutations(n):
    return (torch.tensor(order) for order in itertools.permutations(range(n)))


def objective(own, matching):
    return agreement(own, [identity(own, 0), matching])


# Against brute force and the paper


@pytest.mark.parametrize("start", ["signatures", "identity"])
@pytest.mark.parametrize("seed", range(4))
def test_one_hidden_layer_is_the_best_of_all_assignments_of_six_features(seed, start):
    own = problem(mlp(3, 6, 2, seed=seed), mlp(3, 6, 2, seed=seed + 10), sample=torch.randn(2, 3, dtype=torch.double))
    best = max(permutations(6), key=lambda order: objective(own, {0: order}))
    close(match_weights(own, WeightMatching(starts=(start,)))[1][0], best)


def textbook(a, b, generator):
    """Algorithm 1 of the paper for an MLP: lists of weights [out, in] and biases, spaces visited at random."""
    from scipy.optimize import linear_sum_assignment

    spaces = len(a) - 1
    perms = [torch.arange(len(bias)) for _, bias in a[:-1]]
    while True:
        moved = False
        for layer in torch.randperm(spaces, generator=generator).tolist():
            (w_a, bias_a), (w_b, bias_b) = a[layer], b[layer]
            if layer:
                w_b = w_b[:, perms[layer - 1]]
            gains = w_a @ w_b.T + bias_a[:, None] * bias_b[None, :]
            nxt_a, nxt_b = a[layer + 1][0], b[layer + 1][0]
            if layer + 1 < spaces:
                nxt_b = nxt_b[perms[layer + 1]]
            gains += nxt_a.T @ nxt_b
            new = torch.as_tensor(linear_sum_assignment(gains.numpy(), maximize=True)[1])
            old = perms[layer]
            index = torch.arange(len(new))
            moved |= bool(gains[index, new].sum() > gains[index, old].sum() + 1e-12)
            perms[layer] = new
        if not moved:
            return perms


@pytest.mark.parametrize("seed", range(5))
def test_descent_from_the_models_as_they_are_is_the_algorithm_of_the_paper(seed):
    nets = [mlp(3, 6, 7, 5, 4, seed=seed + 20 * k) for k in range(2)]
    own = problem(*nets, sample=torch.randn(2, 3, dtype=torch.double))
    # The last layer is no part of the trunk: leave it out of the paper's sum too.
    layers = [[(m.weight.data, m.bias.data) for m in net if isinstance(m, nn.Linear)] for net in nets]
    for own_layers in layers:
        own_layers[-1] = (torch.zeros_like(own_layers[-1][0]), own_layers[-1][1])
    expected = textbook(*layers, torch.Generator().manual_seed(3))
    reference = [weight.values[0] for weight in own.weights]
    generator = torch.Generator().manual_seed(3)
    found = Descent(own, 1, reference, begin(own, 1, "identity")).run(generator, 100)
    assert [space.sizes[0] for space in own.spaces] == [6, 7, 5]
    for number, order in enumerate(expected):
        close(found.matching[number], order)
    close(torch.tensor(found.objective()), torch.tensor(objective(own, found.matching)))


def test_one_space_on_both_axes_never_loses_and_ends_where_no_exchange_gains():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(2, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x):
            x = self.first(x)
            return self.last(x + self.middle(x))

    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        nets.append(Recurrent().double())
    own = problem(*nets, sample=torch.randn(3, 2, dtype=torch.double))
    assert len(own.spaces) == 1
    started = objective(own, identity(own, 1))
    found = match_weights(own, WeightMatching(starts=("identity",)))[1]
    assert objective(own, found) >= started
    # The curved objective has no closed form: the end is at least the best under its own linearisation.
    again = Descent(own, 1, [weight.values[0] for weight in own.weights], found)
    assert again.run(torch.Generator(), 1).steps == 0


class Heads(nn.Module):
    def __init__(self, heads=3, width=2):
        super().__init__()
        self.heads, self.width = heads, width
        self.value, self.out = nn.Linear(4, heads * width), nn.Linear(heads * width, 4)
        self.gate, self.last = nn.Parameter(torch.rand(heads)), nn.Linear(4, 1)

    def forward(self, x):
        v = self.value(x).reshape(x.shape[0], self.heads, self.width)
        return self.last(self.out((v.softmax(-1) * self.gate[:, None]).flatten(1)).relu())


def test_blocks_are_the_best_of_all_assignments():
    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        nets.append(Heads().double())
    own = problem(*nets, sample=torch.randn(3, 4, dtype=torch.double))
    (features,) = [number for number, space in enumerate(own.spaces) if space.tie is not None and space.sizes[0] == 6]
    (roots,) = [number for number, space in enumerate(own.spaces) if space.tie is not None and space.sizes[0] == 3]
    (free,) = [number for number, space in enumerate(own.spaces) if space.tie is None]
    found = match_weights(own, WeightMatching())[1]
    best = -torch.inf
    for order in itertools.permutations(range(3)):
        for inner in itertools.product(itertools.permutations(range(2)), repeat=3):
            blocks = own.spaces[features].blocks[1]
            moved = torch.empty(6, dtype=torch.int64)
            for b in range(3):
                moved[own.spaces[features].blocks[0][b]] = blocks[order[b]][list(inner[b])]
            matching = {features: moved, roots: torch.tensor(order), free: found[free]}
            best = max(best, objective(own, matching))
    assert objective(own, found) == pytest.approx(best, rel=1e-12)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 4, 1)
        )

    def forward(self, x):
        return self.layers(x)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_groups_are_the_best_of_all_assignments(seed):
    nets = []
    for k in (1, 2):
        torch.manual_seed(10 * seed + k)
        nets.append(Grouped().double())
    own = problem(*nets, sample=torch.randn(2, 3, 5, 5, dtype=torch.double))
    assert [weight.groups for weight in own.weights if weight.groups > 1] == [2]
    kernel = next(weight for weight in own.weights if weight.groups > 1)
    row, column = (next(iter(run.slots)) for run in kernel.runs)
    found = match_weights(own, WeightMatching(starts=("signatures", "identity")))[1]
    best = -torch.inf
    orders = [torch.tensor(order) for order in itertools.permutations(range(3))]
    for swap in (0, 1):
        for parts in itertools.product(orders, repeat=4):
            matching = dict(found)
            for number, (first, other) in zip((row, column), (parts[:2], parts[2:]), strict=True):
                blocks = own.spaces[number].blocks[1]
                held = torch.empty(6, dtype=torch.int64)
                for b, inner in enumerate((first, other)):
                    held[own.spaces[number].blocks[0][b]] = blocks[(b + swap) % 2][inner]
                matching[number] = held
            best = max(best, objective(own, matching))
    assert objective(own, found) == pytest.approx(best, rel=1e-9)


def test_merge_many_ends_where_no_model_can_be_brought_closer_to_the_others():
    nets = [mlp(3, 5, 2, seed=seed) for seed in range(3)]
    own = problem(*nets, sample=torch.randn(2, 3, dtype=torch.double))
    found = match_weights(own, WeightMatching())
    close(found[0][0], torch.arange(5))
    value = agreement(own, found)
    for k in range(3):
        for order in permutations(5):
            assert agreement(own, [{0: order} if j == k else other for j, other in enumerate(found)]) <= value + 1e-9


# Relabelled copies


def check_twin(model, sample, others=(), **settings):
    """All heads of the zip with relabelled copies give what the model gives, without data."""
    twins = [fxzip.relabel(model, sample, seed=seed, verify=False) for seed in (1, *others)]
    zipped = fxzip.compile_zip([model, *twins], sample, method="weights", verify=False, **settings)
    inputs = sample if isinstance(sample, tuple) else (sample,)
    with torch.no_grad():
        expected, found = model(*inputs), zipped(*inputs)
    for output in found:
        assert relative_difference(expected, output) <= 1e-4
    assert min(space["correlation"] for space in zipped.report["spaces"]) > 0.9999
    return zipped


@pytest.mark.parametrize("model", [Residual, PaddedResNet], ids=["residual", "padded"])
def test_user_defined_twins(model):
    check_twin(randomise(model()), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def test_twin_with_two_inputs_concatenation_a_shared_module_and_tied_weights():
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(3, 3, 8, 8, generator=generator), torch.randint(0, 20, (3, 5), generator=generator)
    check_twin(randomise(Mixed()), sample)


def test_twin_with_attention():
    sample = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    check_twin(randomise(VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4)), sample)


def test_three_twins():
    check_twin(randomise(Residual()), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), others=(2,))


def image(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_torchvision_twins(name):
    check_twin(torchvision_model(name), image())


@pytest.mark.slow
@pytest.mark.parametrize("name", HEAVY)
def test_heavy_torchvision_twins(name):
    check_twin(torchvision_model(name), image())


@pytest.mark.slow
@pytest.mark.hours
@pytest.mark.parametrize("name", LARGE)
def test_large_torchvision_twins(name):
    check_twin(torchvision_model(name), image())


@pytest.mark.slow
@pytest.mark.hours
def test_vision_transformer_twin():
    check_twin(torchvision_model("vit_b_16"), image(224))


def test_a_twin_in_double_precision_is_exact():
    model = randomise(Residual()).double()
    sample = torch.randn(2, 3, 8, 8, dtype=torch.double)
    zipped = fxzip.compile_zip(model, fxzip.relabel(model, sample), sample, method="weights")
    for output in zipped(sample):
        assert relative_difference(model(sample), output) <= 1e-9


def test_a_near_twin_does_not_count_as_one():
    """A test of the tests above: without the right matching the check fails."""
    model, sample = randomise(Residual()), torch.randn(2, 3, 8, 8)
    zipped = fxzip.compile_zip(model, fxzip.relabel(model, sample), sample, method="average", refit=None)
    assert relative_difference(model(sample), zipped(sample)[0]) > 1e-2


# Signatures, widths


def test_signatures_do_not_depend_on_how_other_features_are_labelled():
    model = randomise(Residual())
    sample = torch.randn(2, 3, 8, 8)
    own = problem(model, fxzip.relabel(model, sample), sample=sample)
    matching = match_weights(own, WeightMatching())[1]
    seen = 0
    for weight in own.weights:
        for place, run in enumerate(weight.runs):
            for space in run.slots:
                first, other = (signature(weight, place, space, k) for k in (0, 1))
                close(other[matching[space]], first)
                seen += 1
    assert seen > len(own.weights)


@pytest.mark.parametrize(("first", "second"), [(6, 4), (4, 6)])
def test_models_of_different_widths(first, second):
    wide = mlp(3, 6, 2)
    narrow = mlp(3, 4, 2)
    kept = torch.tensor([5, 0, 3, 1])
    narrow[0].weight.data, narrow[0].bias.data = wide[0].weight.data[kept], wide[0].bias.data[kept]
    nets = [wide, narrow] if first == 6 else [narrow, wide]
    sample = torch.randn(5, 3, dtype=torch.double)
    own = problem(*nets, sample=sample)
    (merge,) = WeightMatching().match(own)
    assert merge.merge.shape == (first, first + second)
    close(merge.merge @ merge.unmerge, torch.eye(first, dtype=torch.double))
    if first == 6:
        close(merge.assignment(1), kept)
        assert merge.correlation == pytest.approx(1)
    else:
        close(merge.assignment(1)[kept], torch.arange(4))
    assert len(fxzip.compile_zip(*nets, sample, method="weights")(sample)) == 2


# Without data


def test_without_data_nothing_is_run_on_the_sample_and_the_report_says_what_it_costs():
    nets = [randomise(Residual(), seed) for seed in (0, 1)]
    sample = torch.randn(2, 3, 8, 8)
    zipped = fxzip.compile_zip(*nets, sample, method="weights")
    scaled = fxzip.compile_zip(*nets, 100 * sample, method="weights")
    for name, value in zipped.state_dict().items():
        close(value, scaled.state_dict()[name], rtol=0, atol=0)
    assert zipped.report["data"] == "without data"
    assert zipped.report["refit"] == "stored"
    assert any("features are matched by weights alone" in note for note in zipped.report["notes"])
    assert "without data" in str(zipped.report)


def test_with_data_the_refit_uses_it():
    nets = [randomise(Residual(), seed) for seed in (0, 1)]
    sample = torch.randn(2, 3, 8, 8)
    zipped = fxzip.compile_zip(*nets, sample, data=[torch.randn(40, 3, 8, 8)], method="weights", refit="repair")
    assert zipped.report["refit"] == "repair"
    assert not zipped.report["notes"]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("refit", ["repair", "lstsq", "batchnorm", fxzip.LeastSquares(ridge=1e-3)])
def test_a_refit_that_is_asked_for_without_data_runs_on_the_sample(refit):
    nets = [randomise(Residual(), seed) for seed in (0, 1)]
    zipped = fxzip.compile_zip(*nets, torch.randn(2, 3, 8, 8), method="weights", refit=refit)
    assert zipped.report["refit"] == refit
    assert zipped.report["data"] == "calibrated on `sample_input`"


def test_no_refit_without_data_is_no_refit():
    nets = [randomise(Residual(), seed) for seed in (0, 1)]
    sample = torch.randn(2, 3, 8, 8)
    plain, stored = (fxzip.compile_zip(*nets, sample, method="weights", refit=refit) for refit in (None, "stored"))
    assert plain.report["refit"] is None
    assert plain.report["data"] == "without data"
    assert not torch.equal(
        plain.state_dict()["trunk.stem.1.running_var"], stored.state_dict()["trunk.stem.1.running_var"]
    )


def test_other_methods_without_data_use_the_sample():
    nets = [randomise(Residual(), seed) for seed in (0, 1)]
    zipped = fxzip.compile_zip(*nets, torch.randn(2, 3, 8, 8), method="permute")
    assert zipped.report["data"] == "calibrated on `sample_input`"
    assert zipped.report["refit"] == "repair"


def test_stored_variances_of_averaged_features():
    """Two kernels at a right angle: the variance of their mean is a quarter of the sum, not half."""

    def net(kernel, variance):
        own = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2)).eval()
        own[0].weight.data = torch.tensor([[*kernel, 0.0], [0.0, 0.0, 7.0]])
        own[1].running_var = torch.tensor([variance, 9.0])
        return own

    nets = [net([3.0, 0.0], 4.0), net([0.0, 5.0], 16.0)]
    zipped = fxzip.compile_zip(*nets, torch.randn(2, 3), method="weights")
    close(zipped.get_submodule("trunk.1").running_var, torch.tensor([(4 + 16) / 4, 9.0]))
    kept = fxzip.compile_zip(nets[0], nets[0], torch.randn(2, 3), method="weights")
    close(kept.get_submodule("trunk.1").running_var, torch.tensor([4.0, 9.0]))


@pytest.mark.parametrize("starts", [(), ("middle",)])
def test_messages(starts):
    with pytest.raises(fxzip.OptionError, match="`starts` must name one or more of 'signatures', 'identity'; got"):
        WeightMatching(starts=starts)


def test_biases_must_count_for_something():
    with pytest.raises(fxzip.OptionError, match="`vectors` must be above 0"):
        WeightMatching(vectors=0)


def test_large_biases_do_not_decide_how_features_are_matched():
    """Kernels of a relabelled copy, but biases in an order of their own: with all weights alike these win."""
    first, order = mlp(6, 8, 3), torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    second = mlp(6, 8, 3)
    for net in (first, second):
        net[0].bias.data = torch.linspace(-20, 20, 8, dtype=torch.float64)
    second[0].weight.data, second[2].weight.data = first[0].weight[order], first[2].weight[:, order]
    own = problem(first, second, sample=torch.randn(2, 6).double())
    [merge] = WeightMatching().match(own)
    assert torch.equal(merge.assignment(1), order)
    [merge] = WeightMatching(vectors=1).match(own)
    assert torch.equal(merge.assignment(1), torch.arange(8))


def test_a_run_brings_features_into_the_layout_of_the_first_model():
    run = Run(1, {0: (torch.tensor([[0, 2]]), torch.tensor([[1, 2]]))}, (torch.tensor([1]), torch.tensor([0])))
    weight = Weight("w", (torch.zeros(1, 3), torch.tensor([[5.0, 6.0, 7.0]])), (run,))
    close(weight.aligned(1, {0: torch.tensor([1, 0])}), torch.tensor([[7.0, 5.0, 6.0]]))
    close(weight.aligned(1, {0: torch.tensor([1, -1])}), torch.tensor([[7.0, 5.0, 0.0]]))
    assert Problem((Space((2, 2)),), (weight,)).ties() == [[0]]
