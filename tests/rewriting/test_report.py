"""The report: its figures against direct counts, its text against its figures."""

import json

import pytest
import torch
from models import randomise
from models.networks import Residual
from torch.utils.flop_counter import FlopCounterMode

import fxzip
from fxzip.analysis.flops import flops_of
from fxzip.matching import Merge
from fxzip.matching.moments import moments
from fxzip.matching.reconstruction import unexplained_share

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def zipped():
    models = randomise(Residual(4), 1), randomise(Residual(5), 2)
    return fxzip.compile_zip(*models, X[:2], data=[X], until="layer1", progress=False)


def counted(net, x):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops()


def test_flops_are_torchs(zipped):
    flops = zipped.report["flops"]
    assert flops["total"] == counted(zipped, X[:2])
    assert flops["originals"] == [counted(Residual(n), X[:2]) for n in (4, 5)]
    assert flops["side_by_side"] == sum(flops["originals"])
    assert flops["total"] == flops["trunk"] + sum(flops["heads"])


def test_parameters_are_those_of_the_modules(zipped):
    parameters = zipped.report["parameters"]
    assert parameters["total"] == sum(p.numel() for p in zipped.parameters())
    assert parameters["heads"] == [sum(p.numel() for p in getattr(zipped, f"head_{k}").parameters()) for k in (0, 1)]


def test_flops_of_nodes_add_up():
    program = fxzip.tracing.trace(Residual(4), X[:2])
    assert sum(flops_of(program).by_node.values()) == counted(Residual(4).eval(), X[:2])


def test_spaces_name_their_size_and_correlation(zipped):
    spaces = {space["name"]: space for space in zipped.report["spaces"]}
    assert spaces["layer1.0.conv1.weight"]["size"] == len(zipped.get_parameter("trunk.layer1.0.conv1.weight"))
    assert all(-1 <= space["correlation"] <= 1 for space in spaces.values())
    assert {space["legality"] for space in spaces.values()} == {"free"}


@pytest.mark.parametrize("kind", ["clusters", "dense"])
def test_the_error_of_a_space_is_what_its_features_lose(kind):
    generator = torch.Generator().manual_seed(0)
    mixed = [torch.randn(30, n, generator=generator) for n in (40, 50)]
    x = [(torch.randn(500, 30, generator=generator) @ own + own[0]).double() for own in mixed]
    if kind == "clusters":
        merge = Merge.from_clusters(torch.arange(90) % 45, (40, 50))
    else:
        matrices = (torch.randn(shape, generator=generator).double() for shape in ((7, 90), (90, 7)))
        merge = Merge(*matrices, (40, 50), 0.0)
    both = torch.cat(x, 1)
    both = both - both.mean(0)
    rest = (both - both @ merge.merge.T @ merge.unmerge.T).square().sum(0).split([40, 50])
    whole = both.square().sum(0).split([40, 50])
    expected = [float(a.sum() / b.sum()) for a, b in zip(rest, whole, strict=True)]
    assert unexplained_share(merge, moments(x)) == pytest.approx(expected, rel=1e-9)


def test_features_that_do_not_vary_lose_nothing_that_can_be_told():
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    error = unexplained_share(Merge.identity(3, models=2), moments([x, torch.full((100, 3), 0.1)]))
    assert error[1] is None
    assert error[0] == pytest.approx(0.25)


def test_every_space_has_its_error(zipped):
    for space in zipped.report["spaces"]:
        assert space["sizes"] == [space["size"]] * 2
        assert all(0 <= error < 2 for error in space["error"])


def test_the_cut_is_where_it_was_asked_for(zipped):
    assert all(path.startswith("layer1") for path in zipped.report["cut"]["modules"])
    assert zipped.report["cut"]["modules"]
    assert zipped.report["unmerges"] == []


def test_it_is_a_mapping_of_plain_data(zipped):
    report = zipped.report
    assert json.loads(json.dumps(report.as_dict()))["models"] == 2
    assert set(report) == set(report.as_dict())
    assert len(report) == len(report.as_dict())


def test_the_text_holds_the_figures(zipped):
    text = str(zipped.report)
    assert f"{zipped.report['flops']['total']:,}" in text
    assert f"{zipped.report['parameters']['trunk']:,}" in text
    for space in zipped.report["spaces"]:
        assert space["name"][:40] in text
    assert "least squares fitted" in text
