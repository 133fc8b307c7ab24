"""Tables of several zips: sweep and compare."""

import builtins
import re
from dataclasses import dataclass

import matplotlib as mpl
import pytest
import torch
from models import randomise
from models.networks import Residual
from torch import nn

import fxzip
from fxzip.calibration.holdout import one_of
from fxzip.matching import Permute
from fxzip.tools.table import Table

mpl.use("agg")
G = torch.Generator().manual_seed(0)
X = torch.randn(2, 3, 8, 8, generator=G)
DATA = [torch.randn(25, 3, 8, 8, generator=G) for _ in range(4)]
LABELS = torch.randint(4, (50,), generator=G)
IMAGES = torch.randn(50, 3, 8, 8, generator=G)


@pytest.fixture(scope="module")
def pair():
    return [randomise(Residual(4), 1), randomise(Residual(5), 2)]


def accuracy(network):
    with torch.no_grad():
        return float((network(IMAGES)[0].argmax(1) == LABELS).double().mean())


@dataclass(frozen=True)
class Fails(Permute):
    def __call__(self, moments, size=None):
        raise fxzip.InputError("This method always fails.")


@pytest.fixture(scope="module")
def compared(pair):
    methods = ["average", Fails(), ("permute", None), fxzip.Zip(alpha=0.5)]
    return fxzip.compare(pair, X, data=DATA, score=accuracy, methods=methods, cuts=(None, "layer1"), progress=False)


def test_a_row_for_each_method_and_cut(compared):
    assert [(row["method"], row["refit"], row["until"]) for row in compared] == [
        ("side by side", None, None),
        *(
            (name, refit, cut)
            for cut in (None, "layer1")
            for name, refit in (
                ("average", "lstsq"), ("Fails()", "lstsq"), ("permute", None), ("Zip(alpha=0.5, beta=1.0)", "lstsq"),
            )
        ),
    ]  # fmt: skip


def test_a_row_holds_what_the_zip_gives(pair, compared):
    """Row by row what `compile_zip` gives with the inputs that are not held out."""
    x = torch.cat(DATA)
    places = one_of(torch.arange(len(x)), 5, 4)
    fit = [part[~places[25 * i : 25 * i + 25]] for i, part in enumerate(DATA)]
    row = next(row for row in compared if row["method"] == "permute" and row["until"] == "layer1")
    options = {"method": "permute", "refit": None, "until": "layer1"}
    zipped = fxzip.compile_zip(*pair, X, data=fit, hold_out=False, progress=False, **options)
    flops, parameters = zipped.report["flops"], zipped.report["parameters"]
    assert row["cost"] == flops["total"] / flops["originals"][0]
    assert row["parameters"] == parameters["total"] / parameters["originals"][0]
    assert row["score"] == accuracy(zipped)
    with torch.no_grad():
        heads = [
            float((y.argmax(1) == model(x[places]).argmax(1)).double().mean())
            for y, model in zip(zipped(x[places]), pair, strict=True)
        ]
    assert row["agreement"] == pytest.approx(sum(heads) / 2)
    assert row["worst"] == min(heads)
    assert row["seconds"] > 0


def test_side_by_side_is_the_upper_bound(pair, compared):
    row = compared[0]
    assert row["agreement"] == row["worst"] == 1.0
    assert row["cost"] == pytest.approx(2.0, abs=0.01)
    assert row["score"] == accuracy(fxzip.side_by_side(pair, X))


def test_a_method_that_fails_is_a_row_with_its_message(compared):
    failed = [row for row in compared if row["method"] == "Fails()"]
    assert [row["error"] for row in failed] == ["InputError: This method always fails."] * 2
    assert all(row["cost"] is None for row in failed)
    assert all(row["error"] is None for row in compared if row["method"] != "Fails()")
    assert str(compared).count("failed: InputError: This method always fails.") == 2


def test_a_table_prints_in_columns(compared):
    lines = str(compared).splitlines()
    assert lines[0].split() == ["method", "refit", "until", "cost", "parameters", "latency", "agreement", "worst",
                                "score", "seconds"]  # fmt: skip
    assert len(lines) == 2 + len(compared) + 1
    assert lines[2].startswith("side by side ")
    assert "heads" in lines[3]
    assert "20 held-out inputs" in lines[-1]


def test_a_table_is_drawn(compared):
    ax = compared.plot()
    assert [line.get_label() for line in ax.lines] == [
        "side by side", "average + lstsq", "permute", "Zip(alpha=0.5, beta=1.0) + lstsq"]  # fmt: skip
    assert ax.get_ylabel() == "score"
    assert (ax.get_title(), ax.get_xlabel()) == ("Cost against score", "FLOPs (× the first model)")
    texts = [text.get_text() for text in ax.texts]
    assert {"heads", "layer1"} <= set(texts)
    assert "side by side, at 2.00 ×" in texts
    bound = ax.lines[0]
    assert set(bound.get_ydata()) == {compared[0]["score"]}
    assert bound.get_linestyle() == "--"
    line = ax.lines[2]
    rows = sorted((row["cost"], row["score"]) for row in compared if row["method"] == "permute")
    assert list(zip(*line.get_data(), strict=True)) == rows
    assert compared.plot(ax, y="worst") is ax
    assert ax.get_ylabel() == "agreement of the worst head (share of inputs)"


def test_a_table_in_a_notebook():
    row = {"method": "<script>", "until": None, "cost": 1.0, "agreement": 0.5}
    failed = {"method": "zip", "until": "a&b", "error": "<b>no</b>"}
    html = Table((row, failed), "held <i>out</i>")._repr_html_()
    for told in ("&lt;script&gt;", "a&amp;b", "failed: &lt;b&gt;no&lt;/b&gt;", "held &lt;i&gt;out", ">0.500<"):
        assert told in html
    assert "<script>" not in html


def test_a_table_has_a_page(compared, tmp_path):
    compared.html(tmp_path / "table.html", title="<b>two</b>")
    text = (tmp_path / "table.html").read_text(encoding="utf-8")
    cells = re.findall(r"<td(?: class=\"n\")?>(.*?)</td>", text)
    for row in compared:
        assert (f"failed: {row['error']}" if row["error"] else f"{row['cost']:.3f}") in cells
    assert {"layer1", "heads", "side by side", "average"} <= set(cells)
    assert len(re.findall("<circle", text)) == sum(row["error"] is None for row in compared)
    assert ">score</text>" in text
    assert compared.note in text
    assert "&lt;b&gt;two&lt;/b&gt;" in text
    assert not re.search("<script|<b>two|src=|https?://", text)

    compared.html(tmp_path / "worst.html", y="worst")
    text = (tmp_path / "worst.html").read_text(encoding="utf-8")
    assert ">agreement of the worst head</text>" in text


def test_a_table_without_figures_has_a_page(tmp_path):
    failed = {"method": "zip", "until": None, "error": "none"}
    Table((failed,)).html(tmp_path / "table.html")
    text = (tmp_path / "table.html").read_text(encoding="utf-8")
    assert "failed: none" in text
    assert "<svg" not in text


def test_plotting_without_matplotlib(compared, monkeypatch):
    real = builtins.__import__

    def fake(name, *rest, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(fxzip.FxzipError, match=re.escape("Install it with `pip install 'fxzip[plot]'`")):
        compared.plot()


def test_several_scores(pair):
    table = fxzip.compare(
        pair, X, data=DATA, methods=["average"], score=lambda net: {"a": accuracy(net), "b": 1}, progress=False
    )
    assert table.scores == ("a", "b")
    assert [row["b"] for row in table] == [1.0, 1.0]
    assert table.plot().get_ylabel() == "a"


@pytest.mark.parametrize(("score", "found"), [
    (lambda net: "good", "found `str`"), (lambda net: {"a": None}, "found `NoneType` under 'a'"),
])  # fmt: skip
def test_scores_that_are_no_numbers(pair, score, found):
    with pytest.raises(fxzip.InputError, match=f"`score` must return a number, or a dict .*{found}"):
        fxzip.compare(pair, X, data=DATA, methods=["average"], score=score, progress=False)


@pytest.mark.slow
def test_the_methods_that_are_compared_by_default(pair):
    table = fxzip.compare(pair, X, data=DATA, progress=False)
    assert [row["method"] for row in table][1:] == ["energy", "zip", "permute", "weights", "average", "alone"]


@pytest.mark.slow
def test_held_out_inputs_of_ones_own(pair):
    table = fxzip.compare(pair, X, data=DATA, methods=["permute"], held_out=[IMAGES], progress=False)
    zipped = fxzip.compile_zip(*pair, X, data=DATA, method="permute", hold_out=False, progress=False)
    agree = [float((y.argmax(1) == m(IMAGES).argmax(1)).double().mean()) for y, m in
             zip(zipped(IMAGES), pair, strict=True)]  # fmt: skip
    assert table[1]["worst"] == min(agree)
    assert "50 held-out inputs" in str(table)


def test_mistakes_end_a_comparison(pair):
    with pytest.raises(fxzip.OptionError, match="`method` must be one of"):
        fxzip.compare(pair, X, data=DATA, methods=["zipp"], progress=False)
    with pytest.raises(fxzip.CutError, match="`until` must name a module"):
        fxzip.compare(pair, X, data=DATA, cuts=["layer9"], progress=False)
    with pytest.raises(fxzip.DataError, match="`compare` holds out one of every 5 inputs"):
        fxzip.compare(pair, X, progress=False)
    with pytest.raises(fxzip.InputError, match="`compare` needs at least two models; found 1"):
        fxzip.compare(pair[:1], X, data=DATA, progress=False)


@pytest.mark.slow
def test_a_sweep_is_the_frontier(pair):
    reads = []

    class Data:
        def __iter__(self):
            reads.append(1)
            return iter(DATA)

    table = fxzip.sweep(pair, X, data=Data(), method="permute", refit=None, score=accuracy, progress=False)
    assert isinstance(table, Table)
    assert len(reads) == 3  # for the sizes that the data holds, what is held out, and the rest of it
    assert [row["until"] for row in table][1:] == [
        "stem", "layer1_0_relu", "layer1.0", "layer1_1_relu", "layer1", "layer2_0_relu", "layer2.0.bn2", "layer2.0",
        "layer2_1_relu", None]  # fmt: skip
    costs = [row["cost"] for row in table]
    assert costs == sorted(costs, reverse=True)
    assert {row["method"] for row in table} == {"side by side", "permute"}
    assert "score" in str(table)


@pytest.mark.slow
def test_a_sweep_over_costs_with_widths_by_need(pair):
    costs, cuts = (0.001, 1.0, 1.5), ["layer1", None]
    table = fxzip.sweep(pair, X, data=DATA, cuts=cuts, max_costs=costs, budget="flops", progress=False)
    wanted = {("auto", cut, cost) for cut in cuts for cost in costs} | {("alone", None, cost) for cost in costs}
    assert {(row["method"], row["until"], row["max_cost"]) for row in table[1:]} == wanted
    for row in table[1:]:
        assert (row["cost"] or 0) <= row["max_cost"]
        assert ("CostError" in (row["error"] or "")) == (row["max_cost"] == 0.001)
        assert row["error"] or row["latency"] > 0
    assert "max_cost" in str(table)
    with pytest.raises(fxzip.OptionError, match="`max_cost` must be positive"):
        fxzip.sweep(pair, X, data=DATA, max_costs=[0.0], progress=False)


@pytest.mark.slow
def test_a_sweep_over_ones_own_cuts(pair):
    table = fxzip.sweep(pair, X, data=DATA, cuts=[0.5, "layer1"], progress=False)
    assert [row["until"] for row in table] == [None, 0.5, "layer1"]
    assert " 0.5 " in str(table)
    with pytest.raises(fxzip.InputError, match="This method always fails"):
        fxzip.sweep(pair, X, data=DATA, cuts=["layer1"], method=Fails(), progress=False)
    with pytest.raises(fxzip.DataError, match="`sweep` holds out"):
        fxzip.sweep(pair, X, data=DATA[0][:20], progress=False)


def test_a_failing_first_model_is_named():
    with pytest.raises(fxzip.InputError, match="`sweep` needs at least two models"):
        fxzip.sweep([nn.Linear(2, 2)], torch.ones(1, 2), progress=False)
