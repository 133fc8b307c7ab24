"""Heads that decide together: what each head says stays, and together they tell the tasks apart."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from models import randomise
from models.networks import Mixed, Residual, Segmenter
from torch import nn

import fxzip
from fxzip.refit.joint import logistic as shifts

try:
    from transformers.modeling_outputs import ImageClassifierOutput
except ImportError:
    ImageClassifierOutput = None
from fxzip.refit.joint.logistic import Evidence, fit_shifts
from fxzip.refit.joint.logit_shifts import pooled


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evidence(inputs=60, features=(7, 4, 5), seed=0, signal=0.7):
    """Tasks that the features know a little about, and scores that know nothing."""
    heads = len(features)
    tasks = torch.arange(inputs) % heads
    centres = [draw(heads, n, seed=seed + 1) for n in features]
    own = tuple(draw(inputs, n, seed=seed + n) + signal * c[tasks] for n, c in zip(features, centres, strict=True))
    return Evidence(own, draw(inputs, heads, seed=seed + 9), tasks)


def gradient(found, seen, ridge):
    """Of the loss at the shifts that were found, by the formula: with respect to the directions of scaled features,
    and to the offsets."""
    moves = torch.stack([(h - h.mean(0)) @ v for h, v in zip(seen.features, found.directions, strict=True)], 1)
    p = (seen.scores + moves + found.offsets).softmax(1)
    surplus = (p - nn.functional.one_hot(seen.tasks, p.shape[1])) * seen.weights()[:, None]
    slopes = []
    for k, (h, v) in enumerate(zip(seen.features, found.directions, strict=True)):
        spread = h.std(0, correction=0)
        slopes.append(((h - h.mean(0)) / spread).T @ surplus[:, k] + ridge * spread * v)
    return torch.cat([*slopes, surplus.sum(0)])


@pytest.mark.parametrize("features", [(7, 4, 5), (90, 70, 5)])
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_the_loss_has_no_slope_where_the_fit_ends(features, ridge):
    seen = evidence(features=features)
    found = fit_shifts(seen, ridges=[ridge], smallest=ridge)
    assert found.ridge == ridge
    assert gradient(found, seen, ridge).abs().max() < 1e-6
    moved = replace(found, directions=(found.directions[0] + 0.01, *found.directions[1:]))
    assert gradient(moved, seen, ridge).abs().max() > 1e-4


def test_every_task_counts_alike_however_many_inputs_it_has():
    seen = evidence()
    first = (seen.tasks == 0).nonzero()[:, 0]
    rows = torch.cat([torch.arange(60), first, first])
    more = Evidence(tuple(h[rows] for h in seen.features), seen.scores[rows], seen.tasks[rows])
    assert more.weights().sum().item() == pytest.approx(1)
    for task in range(3):
        assert more.weights()[more.tasks == task].sum().item() == pytest.approx(1 / 3)


def test_the_ridge_is_the_best_on_other_inputs():
    """Few inputs of many features that know little want much of it, many inputs want little."""
    few, many = evidence(40, (30, 30), seed=3, signal=0.2), evidence(900, (6, 6), seed=3)
    assert fit_shifts(few).ridge > fit_shifts(many).ridge


def test_nothing_where_nothing_helps():
    tasks = torch.arange(80) % 2
    scores = 4.0 * nn.functional.one_hot(tasks, 2).double() - 2
    found = fit_shifts(Evidence((draw(80, 30), draw(80, 30, seed=1)), scores, tasks), ridges=[1e-3])
    assert found.ridge is None
    assert found.before == found.after == pytest.approx(1)
    assert all((v == 0).all() for v in (*found.directions, found.offsets))


def test_constant_features_and_few_inputs_are_no_trouble():
    seen = evidence(15)
    dead = Evidence(tuple(torch.cat([h, torch.ones(15, 1)], 1) for h in seen.features), seen.scores, seen.tasks)
    found = fit_shifts(dead)
    assert all(v.isfinite().all() for v in found.directions)
    assert all(v[-1] == 0 for v in found.directions)


def test_every_fold_weighs_its_tasks_alike():
    seen = evidence(14)
    weights = seen.weights(torch.arange(14) > 4)
    assert weights[:5].sum() == 0
    for task in range(3):
        assert weights[seen.tasks == task].sum().item() == pytest.approx(1 / 3)


def test_every_fit_weighs_the_tasks_alike(monkeypatch):
    seen, fitted, solve = evidence(14), [], shifts._solve

    def watched(problem, ridge, weights):
        fitted.append([weights[problem.tasks == task].sum().item() for task in range(3)])
        return solve(problem, ridge, weights)

    monkeypatch.setattr(shifts, "_solve", watched)
    fit_shifts(seen, ridges=[1.0], smallest=1.0)
    assert len(fitted) >= 5
    assert all(own == pytest.approx([1 / 3] * 3) for own in fitted)


def test_rounding_is_not_taken_for_a_feature():
    tasks = torch.arange(60) % 2
    noise = 1e5 * (1 + 1e-7 * (tasks[:, None] + draw(60, 3)))  # a unit in the last place of float32, by task
    scores = torch.zeros(60, 2).double()
    exact, rounded = (
        Evidence((noise, noise), scores, tasks, torch.finfo(t).eps) for t in (torch.float64, torch.float32)
    )
    assert fit_shifts(exact).after > 0.7
    assert all((v == 0).all() for v in fit_shifts(rounded).directions)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_large_logits_get_large_shifts(scale):
    seen = evidence(300, (8, 8, 8))
    found = fit_shifts(replace(seen, scores=scale * seen.scores))
    assert found.after > found.before + 0.2


def test_features_are_averaged_over_positions():
    x = draw(2, 3, 4, 5)
    torch.testing.assert_close(pooled(x, 1), x.mean((2, 3)))
    torch.testing.assert_close(pooled(x, -1), x.mean((1, 2)))
    torch.testing.assert_close(pooled(x[:, :, 0, 0], -1), x[:, :, 0, 0])


class Classifier(nn.Module):
    """Two hidden layers; `kind` is how it ends."""

    def __init__(self, classes, kind="linear"):
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(inplace=True))
        self.last = nn.Conv1d(12, classes, 1) if kind == "convolution" else nn.Linear(12, classes)

    def forward(self, x):
        if self.kind == "linear":
            return self.last(self.body(x))
        if self.kind == "wrapped":
            return ImageClassifierOutput(logits=self.last(self.body(x)))
        h = self.body(torch.stack([x, x.flip(-1), -x], 1))
        if self.kind == "convolution":
            return self.last(h.transpose(1, 2)).relu().mean(-1)
        return {"logits": self.last(h.mean(1))}


def inputs(task, count=200, seed=0):
    """Tasks differ by where their inputs lie."""
    return draw(count, 6, seed=10 * seed + task).float() + 3 * torch.eye(6)[task]


def logits(output):
    return output if isinstance(output, torch.Tensor) else output["logits"]


def known(network, sources):
    """Share of inputs whose task has the greatest of all logits."""
    hits = 0.0
    for task, x in enumerate(sources):
        best = torch.stack([logits(y).amax(1) for y in network(x)], 1)
        hits += (best.argmax(1) == task).float().mean().item() / len(sources)
    return hits


WRAPPED = pytest.param("wrapped", marks=pytest.mark.skipif(
    ImageClassifierOutput is None, reason="needs transformers"
))  # fmt: skip


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kind", ["linear", "convolution", "dict", WRAPPED])
def test_what_a_head_says_stays_and_together_they_know_the_task(kind):
    models = [randomise(Classifier(n, kind), n) for n in (3, 5, 2)]
    own = fxzip.PerModel(*(inputs(task).split(50) for task in range(3)))
    plain = fxzip.compile_zip(models, inputs(0)[:2], data=own, progress=False)
    joint = fxzip.compile_zip(models, inputs(0)[:2], data=own, joint=True, progress=False)
    fresh = [inputs(task, seed=1) for task in range(3)]
    for x in fresh:
        for before, after in zip(plain(x), joint(x), strict=True):
            torch.testing.assert_close(logits(after).softmax(1), logits(before).softmax(1), rtol=1e-4, atol=1e-6)
            assert logits(after).argmax(1).equal(logits(before).argmax(1))
    assert known(joint, fresh) > known(plain, fresh) + 0.1
    assert known(joint, fresh) > 0.6
    note = joint.report["notes"][-1]
    assert note.startswith("joint: the heads' logits are shifted so that together they name the task of ")


def test_the_note_tells_what_other_inputs_show():
    models = [randomise(Classifier(n), n) for n in (3, 5)]
    both = fxzip.side_by_side(models, inputs(0)[:2])
    joint = fxzip.calibrate_joint(both, inputs(0)[:2], fxzip.PerModel([inputs(0, 2000)], [inputs(1, 2000)]))
    words = joint.report["notes"][-1].split()
    fresh = [inputs(task, 2000, seed=1) for task in range(2)]
    assert float(words[words.index("(before") - 5]) == pytest.approx(100 * known(joint, fresh), abs=3)
    assert both.report["notes"] == ["nothing is merged"]


def calibrated(dtype=torch.float32):
    models = [randomise(Classifier(n), n).to(dtype) for n in (3, 5)]
    both = fxzip.side_by_side(models, inputs(0)[:2].to(dtype))
    data = fxzip.PerModel([inputs(0).to(dtype)], [inputs(1).to(dtype)])
    return both, data, fxzip.calibrate_joint(both, inputs(0)[:2].to(dtype), data, progress=False)


def test_the_network_given_is_left_alone():
    models = [randomise(Classifier(n), n) for n in (3, 5)]
    both = fxzip.side_by_side(models, inputs(0)[:2])
    state, nodes, notes = copy.deepcopy(both.state_dict()), len(both.graph.nodes), list(both.report["notes"])
    random = torch.get_rng_state()
    fxzip.calibrate_joint(both, inputs(0)[:2], fxzip.PerModel([inputs(0)], [inputs(1)]), progress=False)
    assert random.equal(torch.get_rng_state())
    assert len(both.graph.nodes) == nodes
    assert both.report["notes"] == notes
    assert all(torch.equal(value, state[name]) for name, value in both.state_dict().items())


def test_it_is_an_ordinary_module():
    _, _, joint = calibrated()
    x = inputs(1, 7, seed=2)
    wanted = joint(x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(joint))(x), wanted)
    torch.testing.assert_close(copy.deepcopy(joint)(x), wanted)
    other = calibrated()[0]
    assert set(joint.state_dict()) - set(other.state_dict()) == {
        f"joint_{k}_0_{what}" for k in range(2) for what in ("direction", "mean", "offset")
    }
    for k in range(2):
        torch.testing.assert_close(joint.single(k)(x), wanted[k])
        assert not any(f"joint_{1 - k}" in name for name in joint.single(k).code.split())
    program = torch.export.export(joint, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x[:3]), tuple(y[:3] for y in wanted))


@pytest.mark.slow
def test_a_calibrated_network_can_be_zipped_and_calibrated_again():
    _, data, joint = calibrated()
    x = inputs(0)[:2]
    again = fxzip.calibrate_joint(joint, x, data, progress=False)
    for before, after in zip(joint(x), again(x), strict=True):
        torch.testing.assert_close(after.softmax(1), before.softmax(1))
    twice = fxzip.compile_zip(joint, copy.deepcopy(joint), x, data=[inputs(0)], method="permute", progress=False)
    torch.testing.assert_close(twice(x)[1], joint(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    both, _, joint = calibrated(dtype)
    x = inputs(1, 9).to(dtype)
    assert [y.dtype for y in joint(x)] == [dtype, dtype]
    bounds = {"rtol": 0, "atol": 0.03} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(joint(x)[0].softmax(1), both(x)[0].softmax(1), **bounds)


def test_the_greatest_logit_decides_however_many_classes_a_head_has():
    """Of a thousand classes log Σ exp is large whatever the greatest logit is."""
    models = [randomise(Classifier(n), n) for n in (3, 1000)]
    both = fxzip.side_by_side(models, inputs(0)[:2])
    data = fxzip.PerModel([inputs(0, 500)], [inputs(1, 500)])
    joint = fxzip.calibrate_joint(both, inputs(0)[:2], data, progress=False)
    shares = []
    for task in range(2):
        best = torch.stack([y.amax(1) for y in joint(inputs(task, 500, seed=1))], 1)
        shares.append((best.argmax(1) == task).float().mean().item())
    assert min(shares) > 0.85


def test_a_network_in_training_mode_comes_back_in_eval():
    models = [randomise(Classifier(n), n) for n in (3, 5)]
    both = fxzip.side_by_side(models, inputs(0)[:2]).train()
    joint = fxzip.calibrate_joint(both, inputs(0)[:2], fxzip.PerModel([inputs(0)], [inputs(1)]), progress=False)
    assert all(module.training for module in both.modules())
    assert not any(module.training for module in joint.modules())


def test_in_inference_mode():
    both, data, joint = calibrated()
    with torch.inference_mode():
        again = fxzip.calibrate_joint(both, inputs(0)[:2], data, progress=False)
        torch.testing.assert_close(again(inputs(0, 5)), joint(inputs(0, 5)))


class Masked(Classifier):
    def forward(self, x):
        return super().forward(x).masked_fill(torch.arange(3) == 1, -torch.inf)


def test_masked_logits():
    models = [randomise(Masked(3), n) for n in (1, 2)]
    both = fxzip.side_by_side(models, inputs(0)[:2])
    joint = fxzip.calibrate_joint(both, inputs(0)[:2], fxzip.PerModel([inputs(0)], [inputs(1)]), progress=False)
    assert (joint(inputs(0))[0][:, 1] == -torch.inf).all()
    fresh = [inputs(task, seed=1) for task in range(2)]
    assert known(joint, fresh) > known(both, fresh) + 0.1


class Keyword(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.weight, self.bias = nn.Parameter(draw(classes, 6).float()), nn.Parameter(draw(classes).float())

    def forward(self, x):
        return nn.functional.linear(weight=self.weight + 0, bias=self.bias, input=x)


def test_a_function_with_keywords():
    both = fxzip.side_by_side([Keyword(3), Keyword(4)], inputs(0)[:2])
    joint = fxzip.calibrate_joint(both, inputs(0)[:2], fxzip.PerModel([inputs(0)], [inputs(1)]), progress=False)
    assert known(joint, [inputs(task, seed=1) for task in range(2)]) > 0.8


def test_with_a_search_for_the_cut():
    models = [randomise(Residual(n), n) for n in (3, 4)]
    data = fxzip.PerModel(*([draw(100, 3, 8, 8, seed=task).float() + task] for task in range(2)))
    zipped = fxzip.compile_zip(
        models,
        data[0][0][:2],
        data=data,
        until="auto",
        max_cost=1.6,
        budget="flops",
        refit="repair",
        joint=True,
        progress=False,
    )
    assert any(note.startswith("joint: ") for note in zipped.report["notes"])
    assert zipped.report["flops"]["total"] <= 1.6 * zipped.report["flops"]["originals"][0]


@pytest.mark.slow
def test_in_a_table_of_methods():
    models = [randomise(Classifier(n), n) for n in (3, 5)]
    data, fresh = fxzip.PerModel([inputs(0)], [inputs(1)]), [inputs(task, seed=1) for task in range(2)]

    def score(network):
        return known(network, fresh)

    tables = [
        fxzip.compare(models, inputs(0)[:2], data=data, score=score, methods=["permute"], joint=joint, progress=False)
        for joint in (False, True)
    ]
    for before, after in zip(*tables, strict=True):
        assert after["agreement"] == before["agreement"]
        assert after["score"] > before["score"] + 0.1
    with pytest.raises(fxzip.DataError, match="need a source of data for each of the 2 heads"):
        fxzip.sweep(models, inputs(0)[:2], data=[inputs(0)], joint=True, progress=False)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        return self.one(x), self.two(x)


class Bare(nn.Module):
    def forward(self, x):
        return x.softmax(1)


class Rows(nn.Module):
    """Its last linear call reads rows of which there are three for each input."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(2, 2)

    def forward(self, x):
        return self.last(x.reshape(-1, 2)).reshape(-1, 6)


class Tokens(nn.Module):
    """Its last linear call reads several tokens of an input, of which one gives the logits."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(2, 2)

    def forward(self, x):
        return self.last(x.unflatten(1, (3, 2)))[:, 0]


class Words(nn.Module):
    """Its last linear call reads what has nothing to do with the inputs; as many rows as the batch, by chance."""

    def __init__(self):
        super().__init__()
        self.image, self.words, self.table = nn.Linear(6, 5), nn.Linear(4, 5), nn.Parameter(torch.randn(200, 4))

    def forward(self, x):
        return self.image(x) @ self.words(self.table).T


X = inputs(0)


@pytest.mark.parametrize(("models", "data", "error", "message"), [
    ([Classifier(2), Classifier(3)], [X], fxzip.DataError,
     "Joint decisions need a source of data for each of the 2 heads, to know which model an input belongs to; found 1. "
     "Pass `data=fxzip.PerModel(inputs of a, inputs of b, ...)`."),
    ([Classifier(2), Classifier(3)], fxzip.PerModel([X], [X[:4]]), fxzip.DataError,
     "Joint decisions need at least 10 inputs of each task; found 200, 4."),
    ([Twice(), Twice()], None, fxzip.InputError,
     "Joint decisions need one tensor of logits of each head; head 0 returns 2."),
    ([Bare(), Bare()], None, fxzip.InputError,
     "Joint decisions need a linear or convolutional module whose inputs tell the tasks apart; head 0 has none in "
     "front of node `softmax`."),
    ([Rows(), Rows()], None, fxzip.InputError,
     "Joint decisions need features of each input; node `last`, the last linear call of head 0, reads (603, 2) for 201 "
     "inputs."),
    ([Classifier(1), Classifier(3)], None, fxzip.InputError,
     "Joint decisions need logits [batch, classes] of each head, of at least two classes; head 0 returns (200, 1)."),
    ([nn.Sequential(Classifier(2), nn.Softmax(1)), Classifier(3)], None, fxzip.InputError,
     "Joint decisions need logits of each head; head 0 returns shares that sum to one, as a softmax gives. Let the "
     "model end in front of it."),
    ([Tokens(), Tokens()], None, fxzip.InputError,
     "Joint decisions need features of each input; node `last`, the last linear call of head 0, reads (201, 3, 2) for "
     "201 inputs."),
    ([Words(), Words()], None, fxzip.InputError,
     "Joint decisions need features of each input; node `words`, the last linear call of head 0, reads (200, 4) for "
     "201 inputs."),
])  # fmt: skip
def test_what_cannot_be_calibrated(models, data, error, message):
    both = fxzip.side_by_side(models, X[:2])
    with pytest.raises(error) as caught:
        fxzip.calibrate_joint(both, X[:2], data or fxzip.PerModel([X], [X]), progress=False)
    assert str(caught.value) == message


def test_heads_that_are_no_classifiers():
    images = draw(20, 3, 8, 8).float()
    models = [randomise(Residual(3), 1), randomise(Segmenter(4), 2)]
    both = fxzip.side_by_side(models, images)
    with pytest.raises(fxzip.InputError, match=r"of at least two classes; head 1 returns \(20, 4, "):
        fxzip.calibrate_joint(both, images[:2], fxzip.PerModel([images], [images]), progress=False)


def test_a_network_of_one_output():
    with pytest.raises(fxzip.InputError, match="`calibrate_joint` needs a network that returns a tuple with each mod"):
        fxzip.calibrate_joint(Classifier(2), X[:2], fxzip.PerModel([X], [X]))


def test_logits_that_are_not_finite():
    models = [randomise(Classifier(2), 1), randomise(Classifier(3), 2)]
    with torch.no_grad():
        models[1].last.bias.fill_(torch.inf)
    both = fxzip.side_by_side(models, X[:2])
    with pytest.raises(fxzip.DataError, match="head 1 gave 200 that are not on batch 0 of `data`"):
        fxzip.calibrate_joint(both, X[:2], fxzip.PerModel([X], [X]), progress=False)


def test_features_that_are_not_finite():
    models = [randomise(Classifier(2), 1), randomise(Classifier(3), 2)]
    both = fxzip.side_by_side(models, X[:2])
    broken = X.clone()
    broken[3] = torch.nan
    with pytest.raises(fxzip.DataError, match=r"gave \d+ non-finite features on batch 1 of `data`"):
        fxzip.calibrate_joint(both, X[:2], fxzip.PerModel([X], [broken]), progress=False)


def test_compile_zip_asks_before_it_works(monkeypatch):
    monkeypatch.setattr("fxzip.compiler.session.observe", lambda *_: pytest.fail("observed"))
    data = fxzip.PerModel([X], [X])
    with pytest.raises(fxzip.InputError, match=r"of at least two classes; head 1 returns \(3, 1\)"):
        fxzip.compile_zip(Classifier(2), Classifier(1), X[:3], data=data, joint=True, progress=False)
    with pytest.raises(fxzip.InputError, match="need inputs that every model takes, to know which"):
        fxzip.compile_zip(
            Classifier(2), Classifier(3), fxzip.PerModel(X[:3], X[:3]), data=[(X, X)], start="body.1", joint=True
        )
    with pytest.raises(fxzip.DataError, match="need a source of data for each of the 2 heads"):
        fxzip.compile_zip(Classifier(2), Classifier(3), X[:2], data=[X], joint=True, progress=False)


class Classes(Mixed):
    def forward(self, image, words):
        return {"classes": super().forward(image, words)["classes"]}


def test_dicts_in_and_out():
    a, b = randomise(Classes(), 1), randomise(Classes(4), 2)
    sample = {"image": draw(8, 3, 8, 8).float(), "words": torch.arange(24).reshape(8, 3) % 20}
    other = {**sample, "image": sample["image"] + 1}
    both = fxzip.side_by_side([a, b], sample)
    joint = fxzip.calibrate_joint(both, sample, fxzip.PerModel([sample] * 3, [other] * 3), progress=False)
    assert [y["classes"].shape for y in joint(**sample)] == [(8, 3), (8, 4)]
    for before, after in zip(both(**sample), joint(**sample), strict=True):
        moved = (after["classes"] - before["classes"]).mean(1, keepdim=True)
        assert moved.abs().max() > 0.01
        torch.testing.assert_close(after["classes"], before["classes"] + moved)
