"""What a model returns is its own, and nothing is averaged that was not matched."""

import sys

import pytest
import torch
from models import randomise
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.analysis import relative_difference

X = torch.randn(96, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ALONE = {"progress": False, "method": "permute", "refit": None}


class Body(nn.Module):
    """Two hidden layers, an idiom between them, and an ending."""

    def __init__(self, middle=None, end=None, out: int = 1) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.head, self.middle, self.end = nn.Linear(12, out), middle, end
        self.alpha, self.slope, self.weights = nn.Parameter(torch.rand(())), nn.PReLU(), nn.Parameter(torch.rand(2))
        self.kernel, self.codes = nn.Conv1d(1, 1, 3, padding=1), nn.Parameter(torch.randn(5, 12))
        self.score, self.mean = nn.Linear(12, 1), nn.Parameter(torch.randn(6))
        nn.init.constant_(self.slope.weight, float(torch.rand(())))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.second(torch.relu(self.first(x))))
        if self.middle is not None:
            h = torch.relu(self.third(self.middle(self, h)))
        return self.head(h) if self.end is None else self.end(self, h, x)


def pair(**kinds):
    torch.manual_seed(3)
    return [Body(**kinds).double().eval() for _ in range(2)]


def zipped_pair(a, b, **options):
    return fxzip.compile_zip(a, b, X[:4], data=list(X.split(32)), **(ALONE | options))


def _written(x, value):
    out = x.new_zeros(len(x), 1)
    out[:, 0] = value
    return out


ENDS = {
    "one logit": (1, lambda s, h, x: s.head(h)),
    "one logit, squeezed": (1, lambda s, h, x: s.head(h).squeeze(1)),
    "tied to the input": (6, lambda s, h, x: x - s.head(h)),
    "scaled back": (6, lambda s, h, x: s.head(h) * torch.arange(1.0, 7.0, dtype=h.dtype) + 3),
    "argmax": (4, lambda s, h, x: s.head(h).argmax(1)),
    "topk": (4, lambda s, h, x: s.head(h).topk(2, 1).values),
    "mean": (4, lambda s, h, x: s.head(h).mean(1)),
    "logsumexp, written into a tensor": (4, lambda s, h, x: _written(x, s.head(h).logsumexp(1))),
    "logsumexp": (4, lambda s, h, x: -s.head(h).logsumexp(1)),
    "distances": (4, lambda s, h, x: torch.cdist(s.head(h), s.head(h))),
    "sigmoid": (1, lambda s, h, x: torch.sigmoid(s.head(h))),
    "weights, then a sum": (1, lambda s, h, x: (h * s.codes[0]).sum(1)),
    "a product and a sum": (1, lambda s, h, x: (h[:, None] * s.codes).sum(2)),
    "two outputs": (1, lambda s, h, x: (s.head(h), s.score(h)[:, 0])),
    "a value and features of it": (3, lambda s, h, x: {"max": s.head(h).amax(1), "mean": s.head(h).mean()}),
    "einsum": (1, lambda s, h, x: torch.einsum("bc,oc->bo", h, s.head.weight)),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("end", ENDS)
def test_what_a_model_returns_is_its_own(end):
    out, how = ENDS[end]
    a, b = pair(end=how, out=out)
    zipped = zipped_pair(a, b, width=2)  # all features of both fit side by side
    for found, model in zip(zipped(X), (a, b), strict=True):
        assert relative_difference(model(X), found) <= 1e-9
    assert "relu" in zipped.report["cut"]["after"] or "relu_1" in zipped.report["cut"]["after"]
    narrow = zipped_pair(a, b)
    assert relative_difference(*narrow(X)) > 1e-3


FIXED = {
    "cumsum": (lambda s, h: h.cumsum(1), "`cumsum` depends on the order of features"),
    "sort": (lambda s, h: h.sort(1).values, "`sort` depends on the order of features"),
    "mask by place": (lambda s, h: h * (torch.arange(12) < 5).to(h.dtype), "carry no feature"),
    "one-hot of argmax": (lambda s, h: h + F.one_hot(h.argmax(1), 12).to(h.dtype), "`argmax` depends on the order"),
    "rolled by one": (lambda s, h: h + h.roll(1, 1), "`roll` depends on the order of features"),
    "cut and joined": (lambda s, h: h + torch.cat([h[:, 1:], h[:, :1]], 1), "may not change places"),
    "convolution over features": (lambda s, h: s.kernel(h[:, None])[:, 0], "mixes neighbouring places"),
    "one gate for all": (lambda s, h: h * torch.sigmoid(s.score(h)), "no features that could be matched"),
    "codebook": (lambda s, h: F.embedding(torch.cdist(h, s.codes).argmin(1), s.codes), "argmin"),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("middle", FIXED)
def test_the_trunk_ends_in_front_of_what_cannot_be_matched(middle):
    how, why = FIXED[middle]
    a, b = pair(middle=how)
    zipped = zipped_pair(a, b, width=2)
    if all(space["kept"] == 2 * space["size"] for space in zipped.report["spaces"]):
        for found, model in zip(zipped(X), (a, b), strict=True):
            assert relative_difference(model(X), found) <= 1e-9
    else:
        # what is handed over twice keeps its number, and so may features over which a distance is summed
        assert middle in ("rolled by one", "cut and joined", "codebook")
    assert any(why in reason for reason in zipped.report["cut"]["unmatched"].values())
    with pytest.raises(fxzip.BarrierError, match=r"^`strict=True` allows no"):
        zipped_pair(a, b, strict=True)
    with pytest.raises(fxzip.CutError, match="which is not shared"):
        zipped_pair(a, b, until="third")
    assert zipped_pair(a, b, method="average").report["cut"]["unmatched"] == {}  # that was asked for


@pytest.mark.parametrize("middle", ["cumsum", "codebook", "rolled by one"])
def test_inspection_names_the_place(middle):
    how, why = FIXED[middle]
    found = fxzip.inspect(pair(middle=how)[0], X[:4])
    if middle != "rolled by one":  # there no node alone says so
        assert any(why in reason for reason in found.fixed.values())
        assert "fixed order: node" in str(found)


LIFTED = {
    "gate": lambda s, h: h + s.alpha * s.third(h),
    "sigmoid of a gate": lambda s, h: torch.sigmoid(s.alpha) * h,
    "one of several weights": lambda s, h: h * (torch.relu(s.weights) / s.weights.sum())[1],
    "PReLU": lambda s, h: s.slope(s.third(h)),
    "prelu": lambda s, h: F.prelu(s.third(h), s.slope.weight),
    "one bias": lambda s, h: s.third(h) + s.alpha,
    "divided": lambda s, h: s.third(h) / s.alpha,
}


@pytest.mark.parametrize("middle", LIFTED)
@pytest.mark.thinned(2)
def test_scalars_are_features_with_equal_entries(middle):
    a, b = pair(middle=LIFTED[middle])
    zipped = zipped_pair(a, b, width=2)
    for found, model in zip(zipped(X), (a, b), strict=True):
        assert relative_difference(model(X), found) <= 1e-9
    assert zipped.report["cut"]["unmatched"] == {}
    assert len(zipped.report["spaces"]) >= 2
    assert all(space["kept"] == 2 * space["size"] for space in zipped.report["spaces"])


def test_a_part_of_a_table_as_long_as_the_input_is_no_constant():
    """It ends the trunk where models differ in it: lifted, it would have the length of the sample."""

    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
            self.table = nn.Parameter(torch.randn(9, 1))

        def forward(self, x):
            h = torch.relu(self.a(x)) + self.table[: x.shape[1]]
            return self.c(torch.relu(self.b(h)))

    models = [Placed().double().eval() for _ in range(2)]
    x = torch.randn(16, 5, 6, dtype=torch.float64)
    zipped = fxzip.compile_zip(*models, x[:4], data=[x], width=2, **ALONE)
    assert "`table`, which has no features that could be matched" in zipped.report["cut"]["unmatched"]["getitem_1"]
    for length in (5, 3):
        for found, model in zip(zipped(x[:, :length]), models, strict=True):
            assert relative_difference(model(x[:, :length]), found) <= 1e-9


def test_models_that_agree_to_the_bit_share_everything():
    a, _ = pair(middle=FIXED["cumsum"][0], end=lambda s, h, x: x - s.head(h), out=6)
    zipped = zipped_pair(a, a, method="zip")
    assert zipped.report["flops"]["total"] == zipped.report["flops"]["originals"][0]
    for found in zipped(X):
        assert relative_difference(a(X), found) <= 1e-9


class Stream(nn.Module):
    """Blocks that add to one stream of features, and a head that all such models may share."""

    def __init__(self, blocks: int, head: nn.Linear):
        super().__init__()
        self.first, self.head = nn.Linear(6, 12), head
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 12)) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


def zeroed() -> nn.Linear:
    head = nn.Linear(12, 3)
    return head.requires_grad_(False).apply(lambda m: [nn.init.zeros_(p) for p in m.parameters()])


@pytest.mark.parametrize("blocks", [0, 3])
@pytest.mark.parametrize("head", [zeroed, lambda: nn.Linear(12, 3)])
def test_heads_that_are_the_same_to_the_bit_are_heads_where_no_one_layer_writes_what_they_read(head, blocks):
    """No layer is the last one in front of them: all blocks add to the stream, or there is but one."""
    torch.manual_seed(5)
    shared = head()
    a, b = (Stream(blocks, shared).double().eval() for _ in range(2))
    zipped = zipped_pair(a, b, width=2)
    assert zipped.report["cut"]["after"] == ["add_2" if blocks else "relu"]
    for found, model in zip(zipped(X), (a, b), strict=True):
        torch.testing.assert_close(found, model(X), rtol=0, atol=1e-9)


def test_what_goes_into_a_fixed_code_of_the_outputs_is_its_own():
    """Probabilities of bins whose values all models share: the layer that gives them is the head."""
    torch.manual_seed(5)
    bins = nn.Linear(5, 1, bias=False)
    a, b = pair(end=lambda s, h, x: bins(s.head(h).softmax(1)), out=5)
    for model in (a, b):
        model.bins = bins.double()
    zipped = zipped_pair(a, b, width=2)
    assert zipped.report["cut"]["after"] == ["relu_1"]
    for found, model in zip(zipped(X), (a, b), strict=True):
        assert relative_difference(model(X), found) <= 1e-9


class Tags(nn.Module):
    """Decodes a sequence of three by the greatest score of all paths."""

    def __init__(self):
        super().__init__()
        self.score, self.step = nn.Linear(6, 5), nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        given = self.score(x)
        total, back = given[:, 0], []
        for place in (1, 2):
            total, best = (total[:, :, None] + self.step + given[:, place, None]).max(1)
            back.append(best)
        path = [total.argmax(1)]
        for best in reversed(back):
            path.append(best.gather(1, path[-1][:, None])[:, 0])
        return torch.stack(path, 1)


def test_places_that_an_input_picks_are_handed_over_as_they_are():
    """They lie in no pattern along the batch; but none of them is a place of features that were merged."""
    torch.manual_seed(3)
    model, x = Tags().double().eval(), torch.randn(17, 3, 6, dtype=torch.float64)
    zipped = fxzip.compile_zip(model, model, x, data=[x], **ALONE)
    for found in zipped(x):
        assert torch.equal(found, model(x))


RETURNED = {
    "the head's weight": ("relu_1", lambda s, h, x: (s.head(h), s.head.weight)),
    "a view of it": ("relu_1", lambda s, h, x: (s.head(h), s.head.weight.t())),
    "a weight in the middle": ("relu_2", lambda s, h, x: (s.head(s.third(h).relu()), s.third.weight[:3])),
    "its norm": ("relu_2", lambda s, h, x: (s.head(s.third(h).relu()), s.third.weight.norm())),
    "prototypes": ("relu_1", lambda s, h, x: (F.linear(h, F.normalize(s.codes)), F.normalize(s.codes))),
}


@pytest.mark.parametrize("kind", RETURNED)
@pytest.mark.thinned(2)
def test_parameters_that_a_model_returns_are_its_own(kind):
    """Neither merged nor folded nor fitted, though the layer may be shared that they belong to."""
    after, end = RETURNED[kind]
    models = pair(end=end)
    for refit in (None, "auto", "repair"):
        zipped = zipped_pair(*models, method="auto", refit=refit)
        assert zipped.report["cut"]["after"] == [after]
        for found, model in zip(zipped(X), models, strict=True):
            assert torch.equal(found[1], model(X)[1])


def test_what_is_asked_for_beyond_is_said():
    a, b = pair()
    zipped = zipped_pair(a, b, until="head")
    assert torch.equal(*zipped(X))
    notes = " ".join(zipped.report["notes"])
    assert "`until` shares `head`, by which the models compute what they return" in notes
    assert "`head` carries no features of its own for each model: all heads read the same value" in notes


@pytest.mark.slow
def test_a_fraction_never_ends_at_a_value_that_is_nobody_s_own():
    a, b = pair(middle=lambda s, h: h - h.mean(1, keepdim=True))
    for part in range(1, 21):
        try:
            zipped = zipped_pair(a, b, until=part / 20)
        except fxzip.AlignError:
            assert part < 5
            continue
        assert zipped.report["cut"]["alike"] == []
        assert relative_difference(*zipped(X)) > 1e-3


def test_where_all_is_returned_the_message_says_what_to_do():
    a, b = pair(end=lambda s, h, x: (torch.relu(s.first(x)), s.head(h)), out=2)
    with pytest.raises(fxzip.AlignError, match=r"Say where the trunk ends: `until='relu_1'` shares up to there"):
        zipped_pair(a, b)
    zipped = zipped_pair(a, b, until="relu_1", width=2)
    for found, model in zip(zipped(X), (a, b), strict=True):
        assert relative_difference(model(X), found) <= 1e-9


class Factors(nn.Module):
    """Matrix factorisation: what users and items have in common, and a bias of each."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(20, 8), nn.Embedding(30, 8)
        self.user_bias, self.item_bias = nn.Embedding(20, 1), nn.Embedding(30, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        alike = (self.users(user) * self.items(item)).sum(-1)
        return alike + self.user_bias(user)[:, 0] + self.item_bias(item)[:, 0]


def test_the_way_out_names_no_place_without_features_of_their_own():
    """A bias of one number is returned by every head as it is: sharing it would average the models."""
    a, b = (randomise(Factors(), seed).double().eval() for seed in (1, 2))
    x = torch.randint(0, 20, (32,)), torch.randint(0, 20, (32,))
    with pytest.raises(fxzip.AlignError, match="`until='items'` shares up to there"):
        fxzip.compile_zip(a, b, x, progress=False)
    zipped = fxzip.compile_zip(a, b, x, until="items", width=2, progress=False)
    for found, model in zip(zipped(*x), (a, b), strict=True):
        assert relative_difference(model(*x), found) <= 1e-9


class Normalised(Body):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - self.mean)


def test_a_normalisation_of_the_input_that_differs_stays_with_its_model():
    a, b = Normalised().double().eval(), Normalised().double().eval()
    with pytest.raises(fxzip.AlignError, match=r"the models differ in `mean`.* `start='relu'` begins to share there"):
        zipped_pair(a, b)
    zipped = zipped_pair(a, b, start="relu", width=2)
    for found, model in zip(zipped(X), (a, b), strict=True):
        assert relative_difference(model(X), found) <= 1e-9


@pytest.mark.parametrize("stems", [((3, 1), (5, 2)), ((3, 1), (3, 0))])
def test_stems_that_differ_stay_with_their_models(stems):
    torch.manual_seed(0)
    a, b = (
        nn.Sequential(
            nn.Conv1d(2, 8, *size[:1], padding=size[1]), nn.ReLU(), nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Flatten(1),
            nn.LazyLinear(2),
        ).eval() for size in stems
    )  # fmt: skip
    x = torch.randn(32, 2, 5)
    a(x), b(x)
    alike = a[0](x).shape == b[0](x).shape
    with pytest.raises(fxzip.AlignError, match="they part at the first node") as refused:
        fxzip.compile_zip(a, b, x, data=[x], progress=False)
    assert ("`start='_1'` begins to share there" in str(refused.value)) is alike
    if alike:
        zipped = fxzip.compile_zip(a, b, x, method="zip", refit=None, width=2, start="_1", progress=False)
        for found, model in zip(zipped(x), (a, b), strict=True):
            torch.testing.assert_close(found, model(x))


def test_features_that_are_not_folded_are_read_from_all_merged_ones_where_copies_miss_much(monkeypatch):
    a, b = pair(middle=lambda s, h: h.cumsum(1))
    zipped = zipped_pair(a, b, method=fxzip.Energy())
    monkeypatch.setattr(sys.modules["fxzip.rewriting.zip_plan"], "_BETTER", 0.0)
    copied = zipped_pair(a, b, method=fxzip.Energy())
    assert zipped.report["mixed"]
    assert not copied.report["mixed"]
    errors = [
        [relative_difference(model(X), found) for model, found in zip((a, b), one(X), strict=True)]
        for one in (zipped, copied)
    ]
    assert sum(errors[0]) < sum(errors[1])
    monkeypatch.undo()
    assert not zipped_pair(a, a, method=fxzip.Energy(), until="relu_1").report["mixed"]


class Near(nn.Module):
    """Distances to vectors of its own: nothing but a call without a rule meets parameters."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(5, 6))

    def forward(self, x):
        return torch.cdist(x.abs().sqrt(), self.codes)


def test_the_search_for_a_way_out_ends_where_no_cut_shares_anything():
    with pytest.raises(fxzip.AlignError, match="models that agree from the input on; node `cdist` ends the trunk"):
        fxzip.compile_zip(Near(), Near(), torch.randn(8, 6))


class Table(nn.Module):
    """Reads the first places of a table of positions."""

    def __init__(self, length: int, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.head, self.kind = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3), kind
        self.table = nn.Parameter(torch.randn(1, length, 12))
        self.words = nn.Embedding(length, 12)

    def forward(self, x: Tensor) -> Tensor:
        h, steps = self.first(x), x.shape[1]
        h = h + (self.words(torch.arange(steps)) if self.kind == "words" else self.table[:, :steps])
        return self.head(torch.relu(self.second(torch.relu(h))).mean(1))


@pytest.mark.parametrize("kind", ["words", "table"])
def test_the_trunk_ends_at_tables_of_other_lengths(kind):
    a, b = Table(8, kind).double().eval(), Table(11, kind).double().eval()
    x = X.reshape(24, 4, 6)
    zipped = fxzip.compile_zip(a, b, x[:4], data=[x], width=2, **ALONE)
    for found, model in zip(zipped(x), (a, b), strict=True):
        assert relative_difference(model(x), found) <= 1e-9
    assert any("has other lengths in other models" in reason for reason in zipped.report["cut"]["unmatched"].values())


def test_sparse_inputs_are_refused_by_name():
    class Graph(nn.Linear):
        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return torch.sparse.mm(adjacency, super().forward(x))

    edges = torch.eye(6).to_sparse()
    with pytest.raises(fxzip.InputError, match=r"must be dense tensors; `sample_input` holds one of shape \(6, 6\)"):
        fxzip.compile_zip(Graph(6, 2), Graph(6, 3), (torch.randn(6, 6), edges), progress=False)


def test_weights_read_through_a_call_are_weights():
    class Layer(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(outputs, inputs))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight / self.weight.norm(dim=1, keepdim=True)).t()

    a, b = (nn.Sequential(Layer(6, 12), nn.Tanh(), Layer(12, 12), nn.Tanh(), Layer(12, n)).double() for n in (2, 3))
    zipped = zipped_pair(a, b, width=2)
    assert len(zipped.report["spaces"]) == 2
    for found, model in zip(zipped(X), (a, b), strict=True):
        assert relative_difference(model(X), found) <= 1e-9


class GatedParts(nn.Module):
    """A scalar gate, behind a write in place and a Python loop over parts, whose number is guarded."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.alpha = nn.Parameter(torch.rand(()) + 0.5)

    def forward(self, x):
        h = self.first(x)
        h[h < 0.1] = 0
        h = sum(self.second(part) for part in h.chunk(2, 1))
        return self.head(torch.relu(self.alpha.reshape(1, 1) * h))


def test_lifting_keeps_guards_and_what_is_known_of_memory():
    models = [randomise(GatedParts(), seed).double() for seed in range(2)]
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).double()
    zipped = fxzip.compile_zip(models, x[:4], data=[x], progress=False)
    assert "second" in " ".join(zipped.report["cut"]["modules"]) or "relu" in " ".join(zipped.report["cut"]["after"])
    twin = fxzip.compile_zip(models[0], fxzip.relabel(models[0], x[:4]), x[:4], data=[x], progress=False)
    for found in twin(x):
        torch.testing.assert_close(found, models[0](x), rtol=1e-6, atol=1e-6)


class Nearest(nn.Module):
    """Minus the distances from codes, a row for each class: the codes are reshaped before any input meets them."""

    def __init__(self, classes):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)
        self.codes = nn.Parameter(torch.randn(classes, 5))

    def forward(self, x):
        return -torch.cdist(self.second(torch.relu(self.first(x))), self.codes[None].squeeze(0))


def test_what_only_heads_need_is_not_merged_though_it_depends_on_no_input():
    """Tables of other numbers of classes cannot be merged."""
    models = [randomise(Nearest(n), n).double() for n in (3, 4)]
    x = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for until in (None, "first"):
        zipped = fxzip.compile_zip(*models, x[:4], data=[x], width=2.0, refit=None, until=until, progress=False)
        for found, model in zip(zipped(x), models, strict=True):
            torch.testing.assert_close(found, model(x))
        assert not any(name.startswith("trunk.") and "codes" in name for name, _ in zipped.named_parameters())
