"""`docs/report.md` is the account of the report: it names every key, and none that no report has."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from models import randomise
from torch import nn

import fxzip

PAGE = Path(__file__).parents[2] / "docs" / "report.md"
X = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
BY_NAME = {"nodes", "ends", "unmatched", "evaluations"}
"""Dicts whose keys are names of nodes and cuts."""
ELSEWHERE = {"preprocessing", "interrupted"}
"""Keys that need the command line, or Ctrl-C; their tests are in `test_zipping` and `test_frontier`."""


def keys(value, at: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from () if at in BY_NAME else value
        for key, own in value.items():
            yield from keys(own, key)
    elif isinstance(value, (list, tuple)):
        for own in value:
            yield from keys(own)


def network(classes):
    layers = [nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, classes)]
    return randomise(nn.Sequential(*layers), classes)


def pair():
    return [network(4), network(5)]


def reports():
    a, b = models = pair()
    settings = {"data": [X], "progress": False}
    by_need = {"width": "auto", "budget": "flops", "max_cost": 1.2}
    yield fxzip.compile_zip({"a": a, "b": b}, X[:2], **by_need, **settings).report
    yield fxzip.compile_zip(*models, X[:2], rank=0.5, **settings).report
    yield fxzip.compile_zip(*models, X[:2], until="auto", max_cost=1.7, budget="flops", **settings).report
    searched = {"until": "auto", "budget": "parameters", "max_cost": 1.2, "width": "auto"}
    yield fxzip.compile_zip(*models, X[:2], **searched, **settings).report
    yield fxzip.compile_zip(*models, X[:2], start="2", progress=False, hold_out=False).report
    yield fxzip.batch_heads(fxzip.side_by_side(models, X[:2]), timed=False).report
    yield fxzip.narrow(a, X[:2], max_cost=0.8, budget="flops", **settings).report
    words = [nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(24, n)) for n in (2, 3)]
    yield fxzip.compile_zip(*words, torch.randint(9, (16, 3)), progress=False).report


def test_every_key_is_accounted_for():
    found = {key for report in reports() for key in keys(report.as_dict())}
    told = set(re.findall(r'`"(\w+)"`', PAGE.read_text()))
    values = {"free", "blockwise", "pinned", "barrier", "output", "differ", "unsound"}  # not keys
    assert found - told == set()
    assert told - found - ELSEWHERE - values == set()


@pytest.mark.parametrize("budget", ["flops", "parameters"])
def test_what_is_spent_is_told_in_the_budgets_currency(budget):
    models = pair()
    asked = {"budget": budget, "max_cost": 1.2, "width": "auto", "data": [X], "progress": False}
    for until in ("3", "auto"):
        report = fxzip.compile_zip(*models, X[:2], until=until, **asked).report
        spent = report[budget]["total"] / report[budget]["originals"][0]
        assert report["budget"] == {"currency": budget, "max_cost": 1.2, "promised": None, "spent": spent}
        assert spent <= 1.2
        if until == "auto":
            costs = {tried["until"]: tried["cost"] for tried in report["auto"]["frontier"]}
            assert costs[report["auto"]["until"]] == report["auto"].get("cost", spent) == spent
