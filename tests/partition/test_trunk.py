"""Where the trunk ends: closed under what it is computed from, at every node, and never where it would be unsound."""

import itertools

import pytest
import torch
from models import randomise
from models.networks import Mixed, Residual

import fxzip
from fxzip.analysis import relative_difference
from fxzip.analysis.flops import flops_of
from fxzip.partition.dependencies import dependencies
from fxzip.partition.trunk import trunk_of

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def stages(*models, sample=X):
    programs = [fxzip.tracing.trace(model, sample) for model in models]
    return fxzip.partition.align(programs), [fxzip.analysis.label(program, fxzip.RULES) for program in programs]


@pytest.fixture(scope="module")
def pair():
    return stages(randomise(Residual(4), 1).double(), randomise(Residual(5, 12), 2).double())


def shared_nodes(pair):
    return [name for name in fxzip.partition.find_trunk(*pair).nodes if name != "x"]


@pytest.mark.slow
def test_every_cut_is_closed_holds_what_it_names_and_pairs_all_its_spaces(pair):
    graph = dependencies(pair[0].programs[0])
    for name in shared_nodes(pair):
        trunk = fxzip.partition.find_trunk(*pair, until=name)
        assert name in trunk.nodes
        for node in trunk.nodes:
            assert set(graph.predecessors(node)) <= set(trunk.nodes)
        first, *others = ([space.name for space in spaces.spaces] for spaces in trunk.spaces)
        assert all(names == first for names in others)  # the networks have the same names


def test_fractions_grow_into_the_whole(pair):
    program = pair[0].programs[0]
    flops = flops_of(program).by_node
    trunks = [fxzip.partition.find_trunk(*pair, until=share) for share in (0.2, 0.5, 0.8, 1.0)]
    for share, trunk in zip((0.2, 0.5, 0.8, 1.0), trunks, strict=True):
        assert sum(flops[node] for node in trunk.nodes) <= share * sum(flops.values())
    for smaller, larger in itertools.pairwise(trunks):
        assert set(smaller.nodes) < set(larger.nodes)
    assert trunks[-1].nodes == fxzip.partition.find_trunk(*pair).nodes


def test_the_head_begins_where_features_are_written_that_the_model_returns(pair):
    assert fxzip.partition.find_trunk(*pair).ends == {"linear": "it writes features that the model returns"}


CUTS = [name for name in fxzip.inspect(Residual(), torch.randn(2, 3, 8, 8), verify=False).cuts if "." in name]
MIXED = (torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(40).reshape(8, 5) % 20)
MIXED_CUTS = [name for name in fxzip.inspect(Mixed().double(), MIXED, verify=False).cuts if "." not in name]


def test_outputs_over_a_vocabulary_are_not_merged_through_the_table_that_reads_it():
    model = randomise(Mixed()).double()
    with pytest.raises(
        fxzip.CutError, match="needs node `embed`, which is not shared: `embedding` reads its rows by n"
    ):
        fxzip.compile_zip(model, fxzip.relabel(model, MIXED), MIXED, until="decode", progress=False)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("cut", [cut for cut in MIXED_CUTS if cut != "decode"])
def test_a_relabelled_twin_stays_exact_wherever_several_tensors_cross_the_cut(cut):
    model = randomise(Mixed()).double()
    twin = fxzip.relabel(model, MIXED, verify=False)
    options = {"data": [MIXED], "method": "permute", "verify": False, "progress": False, "refit": None}
    zipped = fxzip.compile_zip(model, twin, MIXED, until=cut, **options)
    assert all(space["correlation"] is not None for space in zipped.report["spaces"])
    for output in zipped(*MIXED):
        assert relative_difference(model(*MIXED), output) <= 1e-9


@pytest.mark.slow
@pytest.mark.thinned(3)
@pytest.mark.parametrize("cut", CUTS)
def test_module_paths_are_cuts_too(pair, cut):
    inside = {name for name in fxzip.partition.find_trunk(*pair).nodes if name.startswith(cut.replace(".", "_"))}
    assert inside <= set(fxzip.partition.find_trunk(*pair, until=cut).nodes)


def test_spaces_that_one_model_must_leave_alone_cannot_be_shared(pair):
    alignment, labellings = pair
    pinned = {
        int(label): "for this test" for label in labellings[0].params["layer1.0.conv1.weight"].fields[0].flatten()
    }
    trunk = trunk_of(alignment, labellings, pinned=[pinned, {}])
    [(node, reason)] = trunk.unmatched.items()
    assert node == "layer1_0_conv1"
    assert reason == "features of `layer1.0.conv1.weight` cannot be matched: for this test"
    assert "layer1_0_conv1" not in trunk.nodes


class UnevenGroups(torch.nn.Module):
    """Each of three groups reads pieces of 3, 3 and 2 features of three others: three spaces along each piece of one
    axis, which a solver may find in any order."""

    def __init__(self, classes):
        super().__init__()
        self.a, self.b = torch.nn.Linear(5, 12), torch.nn.Conv1d(12, 24, 1, groups=3)
        self.c, self.head = torch.nn.Conv1d(24, 12, 1, groups=3), torch.nn.Linear(12, classes)

    def forward(self, x):
        h = self.b(torch.relu(self.a(x)).unsqueeze(-1))
        h = h.view(-1, 3, 8, 1).transpose(1, 2).reshape(-1, 24, 1)
        return self.head(torch.relu(self.c(torch.relu(h))).flatten(1))


def test_pieces_of_one_axis_are_paired_by_where_they_lie():
    models = [randomise(UnevenGroups(classes), classes).double() for classes in (3, 4)]
    trunk = fxzip.partition.find_trunk(*stages(*models, sample=torch.randn(8, 5, dtype=torch.float64)))
    held = {space.size for space in trunk.spaces[0].spaces if space.name == "b.weight"}
    assert held == {2, 3}
    where = [
        [spaces.layout(field).space.tolist() for field in spaces.labelling.params["b.weight"].fields]
        for spaces in trunk.spaces
    ]
    assert where[0] == where[1]
