"""The plan: what folds, what matches, and the same result whichever way a head gets its features back."""

from dataclasses import replace

import pytest
import torch
from models import randomise
from models.networks import Residual

import fxzip
from fxzip.rewriting.zip_plan import head_params, plan
from fxzip.tracing.provenance import provenance_of

X = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def observed(until=None, models=None):
    models = models or [randomise(Residual(4), 1).double(), randomise(Residual(5, 12), 2).double()]
    programs = [fxzip.tracing.trace(model, X[:2]) for model in models]
    labellings = [fxzip.analysis.label(program, fxzip.RULES) for program in programs]
    trunk = fxzip.partition.find_trunk(fxzip.partition.align(programs), labellings, until=until)
    return trunk, fxzip.calibration.observe(
        trunk, fxzip.calibration.Calibration.of([X], programs[0].call, 2, False)("observing")
    )


@pytest.mark.parametrize("until", [None, "layer1", "layer1.0", "layer2_0_relu"])
def test_folding_a_gather_changes_nothing_but_the_place_where_it_happens(until):
    """The zip with everything folded that can be, against the same zip with nothing folded: equal outputs."""
    models = [randomise(Residual(4), 1).double(), randomise(Residual(5), 2).double()]
    trunk, statistics = observed(until, models)
    planned = plan(trunk, statistics, fxzip.Zip())
    assert any(planned.folded)
    plain = replace(planned, folded=(frozenset(), frozenset()))
    folded, gathered = fxzip.rewriting.rewrite(planned), fxzip.rewriting.rewrite(plain)
    assert any(provenance_of(n).unmerges for n in gathered.graph.nodes)
    for one, other in zip(folded(X), gathered(X), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_model_of_another_width_does_not_fold():
    """Its features are more than the trunk has, so that its head needs the gather."""
    trunk, statistics = observed()
    planned = plan(trunk, statistics, fxzip.Zip())
    wide = [s for s, merge in planned.merges.items() if merge.sizes[1] != merge.sizes[0]]
    assert wide
    assert not planned.folded[1] & set(wide)


def test_every_space_has_a_merge_of_the_first_models_size():
    trunk, statistics = observed()
    planned = plan(trunk, statistics, fxzip.Zip())
    assert sorted(planned.merges) == list(range(len(trunk.spaces[0].spaces)))
    for number, merge in planned.merges.items():
        sizes = [own.spaces[number].size for own in trunk.spaces]
        assert merge.sizes == tuple(sizes)
        assert merge.merge.shape == (sizes[0], sum(sizes))
    assert not planned.unobserved


@pytest.mark.parametrize("method", [fxzip.Permute(), fxzip.Zip(), fxzip.Energy()])
def test_what_the_data_does_not_reach_is_matched_by_weights_and_said_so(method):
    model = randomise(Residual(4), 1).double()
    trunk, statistics = observed(models=[model, fxzip.relabel(model, X)])
    right = plan(trunk, statistics, fxzip.Permute()).merges
    for missing in statistics:
        planned = plan(trunk, {s: seen for s, seen in statistics.items() if s != missing}, method)
        assert planned.unobserved == {missing}
        for k in range(2):
            torch.testing.assert_close(planned.merges[missing].assignment(k), right[missing].assignment(k))


def test_average_merges_by_position_whatever_the_data_reaches():
    trunk, statistics = observed(models=[randomise(Residual(4), seed).double() for seed in (1, 2)])
    planned = plan(trunk, {}, fxzip.Average())
    assert planned.unobserved == set(statistics)
    for s, merge in planned.merges.items():
        torch.testing.assert_close(merge.assignment(1), torch.arange(merge.sizes[0]), msg=str(s))


def test_the_head_is_what_the_trunk_is_not():
    trunk, _ = observed("layer1")
    for k, program in enumerate(trunk.alignment.programs):
        nodes = {node.name for node in program.module.graph.nodes}
        assert set(trunk.head_nodes(k)) == nodes - set(trunk.names(k).values())
        assert "linear.weight" in head_params(trunk, k)
        assert not any(name.startswith("layer1.0") for name in head_params(trunk, k))


def test_planning_twice_gives_the_same():
    trunk, statistics = observed()
    first, second = (plan(trunk, statistics, fxzip.Energy()) for _ in range(2))
    for number, merge in first.merges.items():
        assert torch.equal(merge.merge, second.merges[number].merge)
        assert torch.equal(merge.unmerge, second.merges[number].unmerge)


@pytest.mark.parametrize(
    ("factor", "entries"), [(-1.0, "-0.5, and sums run from -1 to 1"), (0.5, "0, and sums run from 0.5")]
)
def test_a_merge_that_is_no_average_is_refused(factor, entries):
    """Running variances take M alone: with a sign or a scale in it they would be no variances."""
    trunk, statistics = observed(models=[randomise(Residual(4), seed).double() for seed in (1, 2)])

    class Signed(fxzip.matching.SpaceMethod):
        name = "signed"

        def __call__(self, moments, size):
            merge = fxzip.Average()(moments, size)
            merge.merge[0] *= factor
            return merge

    with pytest.raises(
        fxzip.InputError, match=f"must be a weighted mean: .* in the space of `.*` the least entry is {entries}"
    ):
        plan(trunk, statistics, Signed())
