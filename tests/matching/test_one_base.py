"""Fine-tunes of one base: methods of task vectors against closed forms, how fine-tunes are recognised, own heads."""

import copy
import itertools

import pytest
import torch
from fxzip.baselines import TSV, IsoC, TaskArithmetic, Ties
from models import randomise
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.compiler.one_base import closeness
from fxzip.compiler.options import Options
from fxzip.compiler.survey import survey
from fxzip.matching import ENTRIES, Parameter, TaskVectorMethod
from fxzip.tracing.calls import as_call

close = torch.testing.assert_close
METHODS = [name for name, entry in ENTRIES.items() if issubclass(entry.method, TaskVectorMethod)]
G = torch.Generator().manual_seed(0)


def one(base, *values):
    return Parameter("weight", base, values)


class Residual(nn.Module):
    """Convolutions, BatchNorms, a residual sum, and a head of its own."""

    def __init__(self, classes):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.inner_norm(self.inner(x)))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """A block of a transformer on patches, and a head of its own."""

    def __init__(self, classes):
        super().__init__()
        self.patches, self.position = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.zeros(1, 4, 8))
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x)).mean(1))


def family(make, classes=(2, 3, 5), noise=0.1, frozen=()):
    """A base, and fine-tunes of it with heads of their own."""
    base = randomise(make(7), 1)
    tuned = []
    for seed, count in enumerate(classes):
        model = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(10 + seed)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name not in frozen:
                    value += noise * value.abs().mean() * torch.randn(value.shape, generator=generator)
        model.head = randomise(nn.Linear(8, count), seed)
        tuned.append(model.eval())
    return base, tuned


def with_heads(model, *classes):
    """Copies of a network with other heads."""
    copies = [copy.deepcopy(model) for _ in classes]
    for seed, (own, count) in enumerate(zip(copies, classes, strict=True)):
        own.head = randomise(nn.Linear(8, count), seed)
    return copies


NETWORKS = {"ResNet with BatchNorm": Residual, "transformer": Attention}
X = torch.randn(60, 3, 8, 8, generator=G)
FIXED = {"refit": None, "verify": False, "progress": False}


def trunk(zipped):
    return {name.removeprefix("trunk."): v for name, v in zipped.named_parameters() if name.startswith("trunk.")}


# Closed forms


def test_task_arithmetic_with_equal_shares_is_the_average():
    base, tuned = family(Residual)
    mean = trunk(fxzip.compile_zip(tuned, X[:2], method=TaskArithmetic(scale=1 / 3), base=base, **FIXED))
    average = [torch.stack([dict(m.named_parameters())[name] for m in tuned]).mean(0) for name in mean]
    close(list(mean.values()), average, rtol=1e-4, atol=1e-5)
    weighed = fxzip.compile_zip(tuned, X[:2], method="task-arithmetic", weights=[1 / 3] * 3, base=base, **FIXED)
    close(trunk(weighed), mean, rtol=1e-4, atol=1e-5)
    default = trunk(fxzip.compile_zip(tuned, X[:2], base=base, method="task-arithmetic", **FIXED))
    start = dict(base.named_parameters())
    for name, value in default.items():
        close(value, start[name] + 0.4 * sum(dict(m.named_parameters())[name] - start[name] for m in tuned))


def test_ties_on_vectors_made_by_hand():
    """τ_1 = (4, -3, 1, 0) and τ_2 = (2, 6, -1, 0), trimmed to half of their entries: (4, -3, 0, 0) and (2, 6, 0, 0).
    The signs are + and +: the mean of 4 and 2, and 6 alone."""
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    tuned = base + torch.tensor([4.0, -3.0, 1.0, 0.0]), base + torch.tensor([2.0, 6.0, -1.0, 0.0])
    close(Ties(density=0.5).combine([one(base, *tuned)])[0], base + torch.tensor([3.0, 6.0, 0.0, 0.0]))
    close(Ties(density=0.5, scale=2.0).combine([one(base, *tuned)])[0], base + torch.tensor([6.0, 12.0, 0.0, 0.0]))
    # with weights 3 : 1 the second entry is 1.5 · -3 + 0.5 · 6 < 0, and the first 1.5 · 4 + 0.5 · 2 over 2
    found = Ties(density=0.5, weights=(3, 1)).combine([one(base, *tuned)])[0]
    close(found, base + torch.tensor([3.5, -3.0, 0.0, 0.0]))


def test_ties_trims_all_parameters_together():
    zero = torch.zeros(2)
    large, small = one(zero, torch.tensor([5.0, 6.0]), zero), one(zero, torch.tensor([1.0, 2.0]), zero)
    close(Ties(density=0.5).combine([large, small]), [torch.tensor([5.0, 6.0]), torch.zeros(2)])


def test_tsv_adds_up_tasks_whose_singular_vectors_are_orthogonal():
    left, right = (torch.linalg.qr(torch.randn(6, 6, generator=G).double())[0] for _ in range(2))
    sizes = torch.tensor([3.0, 2.0, 1.0]).double()
    parts = [(left[:, i : i + 3] * sizes) @ right[:, i : i + 3].T for i in (0, 3)]
    base = torch.randn(6, 6, generator=G).double()
    close(TSV().combine([one(base, *(base + part for part in parts))])[0], base + sum(parts))


def test_tsv_keeps_singular_values_and_makes_vectors_orthonormal():
    tuned = [torch.randn(6, 8, generator=G).double() for _ in range(3)]
    found = TSV().combine([one(torch.zeros(6, 8).double(), *tuned)])[0]
    kept = torch.cat([torch.linalg.svdvals(value)[:2] for value in tuned])
    close(torch.linalg.svdvals(found), kept.sort(descending=True).values)


def test_iso_c_has_equal_singular_values_and_the_vectors_of_the_sum():
    tuned = [torch.randn(5, 2, 3, 1, generator=G).double() for _ in range(3)]
    found = IsoC().combine([one(torch.zeros(5, 2, 3, 1).double(), *tuned)])[0]
    total = sum(tuned).reshape(5, 6)
    sizes = torch.linalg.svdvals(total)
    close(torch.linalg.svdvals(found.reshape(5, 6)), sizes.mean().expand(5))
    close((found.reshape(5, 6).T @ total).trace(), sizes.mean() * sizes.sum())


@pytest.mark.parametrize("method", [TSV(), IsoC()], ids=["tsv", "iso-c"])
def test_vectors_take_the_mean(method):
    found = method.combine([one(torch.ones(1, 3, 1), torch.zeros(1, 3, 1), 4 * torch.ones(1, 3, 1))])
    close(found[0], 2 * torch.ones(1, 3, 1))


@pytest.mark.parametrize("method", [Ties(density=1.0), TSV(), IsoC()], ids=["ties", "tsv", "iso-c"])
def test_only_ratios_of_weights_count(method):
    values = [torch.randn(4, 4, generator=G).double() for _ in range(2)]
    found = []
    for weights in ((3, 1), (0.75, 0.25), (1, 1)):
        weighted = type(method)(**{**vars(method), "weights": weights})
        found.append(weighted.combine([one(torch.zeros(4, 4).double(), *values)])[0])
    close(found[0], found[1])
    close(found[2], method.combine([one(torch.zeros(4, 4).double(), *values)])[0])
    assert not torch.allclose(found[0], found[2])


# In the pipeline


@pytest.mark.parametrize("name", ["average", *METHODS])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=list(NETWORKS))
@pytest.mark.thinned(2)
def test_networks_keep_their_heads_and_what_they_agree_in_to_the_bit(make, name):
    frozen = [key for key, _ in make(2).named_parameters()][:3]
    base, tuned = family(make, frozen=frozen)
    with torch.no_grad():
        dict(base.named_parameters())[frozen[0]].zero_()  # so that the models agree, and not with the base
    zipped = fxzip.compile_zip(tuned, X[:2], method=name, base=None if name == "average" else base, **FIXED)
    parameters = dict(zipped.named_parameters())
    if name == "average":  # which looks at the sample: BatchNorms get the statistics of that, and their scales follow
        frozen = [key for key in frozen if not key.startswith("norm")]
    for key in frozen:
        assert torch.equal(parameters[f"trunk.{key}"], dict(tuned[0].named_parameters())[key]), key
    for k, model in enumerate(tuned):
        assert torch.equal(parameters[f"head_{k}.head.weight"], model.head.weight)
        assert zipped(X)[k].shape == model(X).shape


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", NETWORKS.values(), ids=list(NETWORKS))
def test_the_trunk_holds_what_the_method_makes_of_all_parameters(make, name):
    base, tuned = family(make)
    zipped = fxzip.compile_zip(tuned, X[:2], method=name, base=base, **FIXED)
    shared, start = trunk(zipped), dict(base.named_parameters())
    names = [key for key in start if not key.startswith("head.")]
    assert sorted(shared) == sorted(names)
    there = [dict(model.named_parameters()) for model in tuned]
    given = [Parameter(key, start[key], tuple(own[key].detach() for own in there)) for key in names]
    for key, value in zip(names, ENTRIES[name].method().combine(given), strict=True):
        close(shared[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_copies_of_one_network_give_that_network(name):
    base, (model, *_) = family(Residual)
    models = with_heads(model, 2, 3)
    zipped = fxzip.compile_zip(models, X[:2], method=name, base=base, **FIXED)
    for output, own in zip(zipped(X), models, strict=True):
        close(output, own(X), rtol=1e-4, atol=1e-5)


def test_weights_weigh_models_also_by_name():
    _, tuned = family(Attention, classes=(2, 3))
    by_number = trunk(fxzip.compile_zip(tuned, X[:2], method="average", weights=[3, 1], **FIXED))
    models = dict(zip(("a", "b"), tuned, strict=True))
    by_name = trunk(fxzip.compile_zip(models, X[:2], method="average", weights={"b": 1, "a": 3}, **FIXED))
    for name, value in by_number.items():
        close(value, 0.75 * dict(tuned[0].named_parameters())[name] + 0.25 * dict(tuned[1].named_parameters())[name])
        close(by_name[name], value)


@pytest.mark.parametrize("given", ["network", "state dict", "state dict without a head"])
def test_a_base_is_a_network_or_its_state_dict(given):
    base, tuned = family(Attention)
    state = {key: v for key, v in base.state_dict().items() if given == "state dict" or not key.startswith("head")}
    known = trunk(fxzip.compile_zip(tuned, X[:2], method="ties", base=base, **FIXED))
    found = trunk(fxzip.compile_zip(tuned, X[:2], method="ties", base=base if given == "network" else state, **FIXED))
    close(found, known, rtol=0, atol=0)


class Odd(nn.Module):
    """Names that are no names in code, a functional BatchNorm, a weight norm: the graph calls parameters otherwise."""

    def __init__(self, classes):
        super().__init__()
        second = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.parts = nn.ModuleDict({"class": nn.Linear(6, 8), "in": second})
        self.norm = nn.Module()
        for name, value in (("weight", torch.ones(8)), ("bias", torch.zeros(8))):
            self.norm.register_parameter(name, nn.Parameter(value))
        self.norm.register_buffer("running_mean", torch.zeros(8))
        self.norm.register_buffer("running_var", torch.ones(8))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        n = self.norm
        x = F.batch_norm(self.parts["class"](x), n.running_mean, n.running_var, n.weight, n.bias)
        return self.head(F.relu(self.parts["in"](F.relu(x))))


def test_parameters_of_the_base_are_found_under_the_names_of_the_model():
    base, tuned = family(Odd, classes=(2, 3))
    zipped = fxzip.compile_zip(tuned, torch.ones(2, 6), method=TaskArithmetic(scale=0.25), base=base, **FIXED)
    shared = trunk(zipped)
    assert len(shared) == 6
    for ending, of in {
        "class_.weight": lambda m: m.parts["class"].weight, "in_.weight": lambda m: m.parts["in"].weight,
        "norm.weight": lambda m: m.norm.weight, "norm.bias": lambda m: m.norm.bias,
    }.items():  # fmt: skip
        (value,) = (v for name, v in shared.items() if name.endswith(ending))
        close(value, 0.5 * of(base) + 0.25 * (of(tuned[0]) + of(tuned[1])))


def test_data_free_and_with_data():
    base, tuned = family(Residual)
    free = fxzip.compile_zip(tuned, X[:2], method="tsv", base=base, progress=False)
    assert free.report["refit"] == "stored"
    fitted = fxzip.compile_zip(tuned, X[:2], data=[X], method="tsv", base=base, progress=False)
    assert fitted.report["refit"] == "lstsq"
    lost = [[float((y - m(X)).norm() / m(X).norm()) for y, m in zip(z(X), tuned, strict=True)] for z in (free, fitted)]
    assert max(lost[1]) < min(lost[0])


def test_compare_takes_a_base_for_the_rows_that_want_one():
    base, tuned = family(Residual, classes=(2, 3))
    table = fxzip.compare(
        tuned, X[:2], data=[X], methods=["average", ("tsv", "batchnorm")], base=base, weights=[1, 2], progress=False
    )
    assert [row["method"] for row in table] == ["side by side", "average", "tsv"]
    assert not any(row["error"] for row in table)
    with pytest.raises(fxzip.OptionError, match='`method="tsv"` needs `base`'):
        fxzip.compare(tuned, X[:2], data=[X], methods=["tsv"], progress=False)


# RegMean++


@pytest.mark.parametrize("refit", ["regmean", "regmean++"])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=list(NETWORKS))
def test_regmean_of_one_model_is_that_model(make, refit):
    _, (model, *_) = family(make)
    twins = with_heads(model, 2, 3)
    zipped = fxzip.compile_zip(
        twins, X[:2], data=[X], method="average", refit=refit, hold_out=False, verify=False, progress=False
    )
    for name, value in trunk(zipped).items():
        if "norm" in name and make is Residual:  # statistics of BatchNorms are recorded anew, and their scales follow
            continue
        assert torch.equal(value, dict(model.named_parameters())[name]), name
    for output, own in zip(zipped(X), twins, strict=True):
        close(output, own(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_regmean_plus_plus_is_the_formula_on_inputs_of_the_merged_network(alpha):
    a, b = (
        randomise(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, n)), n).double()
        for n in (2, 3)
    )
    data = [torch.randn(40, 5, generator=G).double(), 2 * torch.randn(30, 5, generator=G).double()]
    zipped = fxzip.compile_zip(
        a, b, data[0], data=fxzip.PerModel([data[0]], [data[1]]), method="average", hold_out=False, progress=False,
        refit=fxzip.baselines.RegMeanPlusPlus(alpha),
    )  # fmt: skip
    found = trunk(zipped)
    seen = data
    for depth in (0, 2):
        grams = [alpha * x.T @ x + (1 - alpha) * torch.diag((x.T @ x).diagonal()) for x in seen]
        weights = [model[depth].weight.T for model in (a, b)]
        wanted = torch.linalg.solve(sum(grams), sum(g @ w for g, w in zip(grams, weights, strict=True)))
        close(found[f"{depth}.weight"], wanted.T, rtol=1e-6, atol=1e-8)
        bias = (a[depth].bias + b[depth].bias) / 2
        seen = [torch.tanh(x @ wanted + bias) for x in seen]


@pytest.mark.parametrize("refit", ["regmean", "regmean++"])
def test_a_batchnorm_belongs_to_the_call_in_front_of_it(refit):
    """Networks whose kernels and statistics have other scales, but which compute the same."""
    _, (model, *_) = family(Residual)
    model, other = with_heads(model, 2, 3)
    with torch.no_grad():
        other.stem.weight *= 3
        other.norm.running_mean *= 3
        other.norm.running_var.copy_(9 * (other.norm.running_var + other.norm.eps) - other.norm.eps)
    twin = with_heads(model, 2, 3)[1]
    close(other(X), twin(X), rtol=1e-4, atol=1e-5)
    zipped = fxzip.compile_zip(
        [model, other], X[:2], data=[X], method="average", refit=refit, hold_out=False, verify=False, progress=False
    )
    for output, own in zip(zipped(X), (model, twin), strict=True):
        close(output, own(X), rtol=1e-3, atol=1e-3)


# Recognising


def near(models, x):
    found = survey(models, as_call(x[:2]), Options(verify=False))
    return closeness(found.alignment, found.labellings[0])


@pytest.mark.parametrize("make", NETWORKS.values(), ids=list(NETWORKS))
def test_fine_tunes_are_recognised_and_others_are_not(make):
    _, tuned = family(make, noise=0.5)
    assert near(tuned, X).fine_tunes
    strangers = [randomise(make(n), seed) for seed, n in enumerate((2, 3))]
    assert near(strangers, X).least < 0.3
    assert not near(strangers, X).fine_tunes
    assert not near([*tuned, strangers[0]], X).fine_tunes


def test_what_was_recognised_is_merged_as_it_stands_and_said():
    _, tuned = family(Residual)
    for refit, method in {"repair": "Average(", "regmean": "Average(", "lstsq": "Energy("}.items():
        zipped = fxzip.compile_zip(tuned, X[:2], data=[X], refit=refit, verify=False, progress=False)
        assert zipped.report["method"].startswith(method)
        (note,) = [note for note in zipped.report.notes if "are fine-tunes of one base" in note]
        assert note.endswith("nothing is matched" if method == "Average(" else "least squares does better by that")
    turned = copy.deepcopy(tuned[1])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        turned.inner.weight.copy_(turned.inner.weight[order])
    matched = fxzip.compile_zip([tuned[0], turned], X[:2], data=[X], refit="repair", verify=False, progress=False)
    assert matched.report["method"].startswith("Zip(")
    assert not any("are fine-tunes of one base" in note for note in matched.report.notes)


def test_a_base_decides_what_auto_is():
    base, tuned = family(Residual, classes=(2, 3))
    how = {"base": base, "verify": False, "progress": False}
    free = fxzip.compile_zip(tuned, X[:2], **how)
    assert free.report["method"] == "TSV(scale=1.0, weights=None)"
    assert free.report["refit"] == "stored"
    fitted = fxzip.compile_zip(tuned, X[:2], data=[X], **how)
    assert fitted.report["method"].startswith("Energy(")
    assert any(note.startswith("`base` was not looked at") for note in fitted.report.notes)
    weighed = fxzip.compile_zip(tuned, X[:2], data=[X], refit="repair", weights=[2, 1], **how)
    assert weighed.report["method"] == "TSV(scale=1.0, weights=(2.0, 1.0))"


# Bad input

BASE, TUNED = family(Residual, classes=(2, 3))


class Wider(Residual):
    def __init__(self, classes):
        super().__init__(classes)
        self.inner = nn.Conv2d(8, 9, 3, padding=1)


WRONG = {
    "no base": ({"method": "ties"}, fxzip.OptionError, '`method="ties"` needs `base`'),
    "another base": (
        {"method": "tsv", "base": nn.Linear(2, 2)}, fxzip.InputError, "7 of 7 are not there, the first `stem.weight`"
    ),
    "wider base": (
        {"method": "tsv", "base": Wider(2)}, fxzip.InputError,
        r"they differ first in `inner.weight`, \[9, 8, 3, 3\] in the base and \[8, 8, 3, 3\] in the first model",
    ),
    "base of another kind": ({"method": "tsv", "base": "resnet18"}, fxzip.InputError, "found `str`"),
    "empty base": ({"method": "tsv", "base": {}}, fxzip.InputError, "found `dict` without a tensor"),
    "not finite": (
        {"method": "tsv", "base": {k: v + float("nan") for k, v in BASE.state_dict().items()}}, fxzip.InputError,
        "must hold finite numbers; `stem.weight`",
    ),
    "base unread": ({"method": "zip", "base": BASE}, fxzip.OptionError, r"`base` must go with .* found `Zip\("),
    "weights unread": ({"method": "permute", "weights": [1, 2]}, fxzip.OptionError, r"found `Permute\(\)`"),
    "too many": ({"method": "average", "weights": [1, 2, 3]}, fxzip.OptionError, "each of the 2 models; found 3"),
    "by name": ({"method": "average", "weights": {"a": 1}}, fxzip.OptionError, "models without names; found 'a'"),
    "no numbers": ({"method": "average", "weights": ["a", "b"]}, fxzip.OptionError, "a number for each model"),
    "negative": ({"method": "average", "weights": [2, -1]}, fxzip.OptionError, "must be positive.* found -1.0"),
    "infinite": (
        {"method": "task-arithmetic", "base": BASE, "weights": [2, float("inf")]}, fxzip.OptionError, "must be finite"
    ),
    "widths": (
        {"method": "tsv", "base": BASE, "width": 0.5, "data": [X]}, fxzip.InputError, "keeps all of them; this space"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_said(case):
    options, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        fxzip.compile_zip(TUNED, X[:2], verify=False, progress=False, **options)


def test_weights_need_a_method_that_takes_them_where_it_is_left_open():
    strangers = [randomise(Residual(n), seed) for seed, n in enumerate((2, 3))]
    with pytest.raises(fxzip.OptionError, match=r"`weights` must go with .* found `Energy\("):
        fxzip.compile_zip(strangers, X[:2], data=[X], weights=[1, 2], verify=False, progress=False)
    zipped = fxzip.compile_zip(TUNED, X[:2], data=[X], weights=[1, 2], verify=False, progress=False)
    assert zipped.report["method"] == "Average(weights=(1.0, 2.0))"


def test_densities_and_their_ranges():
    with pytest.raises(fxzip.OptionError, match="`Ties` needs 0 < density <= 1; found density=0"):
        Ties(density=0)
    for method, weights in itertools.product((Ties, TSV, IsoC), ((0, 1), (1, -1))):
        with pytest.raises(fxzip.OptionError, match="positive"):
            method(weights=weights)
