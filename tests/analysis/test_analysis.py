"""The analysis finds what may move, leaves alone what may not, and says why."""

import pytest
import torch
import torchvision
from models import randomise
from models.random_networks import random_network
from models.zoo import ZOO, head, image, tokens
from torch import nn

from fxzip.analysis import label, random_relabelling, relabelled, relative_difference, self_check, solve
from fxzip.analysis.checking import run_with
from fxzip.analysis.rules import RULES
from fxzip.tracing import trace
from fxzip.tracing.calls import as_call


def analysed(model, sample):
    labelling = label(trace(model, sample), RULES)
    return labelling, solve(labelling)


def moved(model, sample, seed=0):
    """How far a random relabelling of everything that may move moves the output, on the model's own parameters."""
    labelling, spaces = analysed(model.double(), sample)
    program = labelling.program
    values = {k: v.detach() for k, v in (*program.module.named_parameters(), *program.module.named_buffers())}
    perms = random_relabelling(spaces, torch.Generator().manual_seed(seed))
    other = relabelled(values, spaces, perms)
    return relative_difference(*(run_with(program, own, program.call, torch.float64) for own in (values, other)))


def outline(spaces):
    return sorted((space.size, space.legality) for space in spaces.spaces)


def doubled(sample):
    call = as_call(sample)
    return tuple(value.double() if value.is_floating_point() else value for value in call.args)


@pytest.mark.parametrize("name", ZOO)
def test_zoo_is_exact(name):
    model, sample = ZOO[name]()
    assert moved(randomise(model), doubled(sample)) < 1e-12


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenet_v3_small",
        "densenet121",
        "shufflenet_v2_x0_5",
        "regnet_y_400mf",
        "efficientnet_b0",
        "swin_t",
    ],
)
def test_torchvision_is_exact(name):
    model = torchvision.models.get_model(name, weights=None, num_classes=5)
    assert moved(randomise(model), (image(3, 32).double(),)) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maxvit_t", "swin_v2_t", "vit_b_16"])
def test_large_images_are_exact(name):
    model = torchvision.models.get_model(name, weights=None, num_classes=5)
    assert moved(randomise(model), (image(3, 224, 1).double(),)) < 1e-11


class SharedInside(nn.Module):
    """Attention whose heads share what scales the features inside a head, as pooled attention does."""

    def __init__(self, heads, inner):
        super().__init__()
        self.heads, self.inner = heads, inner
        self.first, self.qkv = nn.Linear(8, 6), nn.Linear(6, 3 * heads * inner)
        self.norms = nn.ModuleList(nn.LayerNorm(inner) for _ in range(3))
        self.last = nn.Linear(heads * inner, 2)

    def forward(self, x):
        parts = self.qkv(torch.relu(self.first(x))).view(*x.shape[:2], 3, self.heads, self.inner)
        q, k, v = (norm(part.transpose(1, 2)) for norm, part in zip(self.norms, parts.unbind(2), strict=True))
        return self.last((torch.softmax(q @ k.transpose(-1, -2), -1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("heads", "inner", "expected"),
    [
        (3, 4, [(4, "free"), (4, "relabel only"), (6, "free")]),  # places inside heads move, in all heads alike
        (4, 3, [(4, "relabel only"), (6, "free")]),  # heads move as a whole
    ],
)
def test_the_kind_with_fewer_blocks_is_held(heads, inner, expected):
    model = randomise(SharedInside(heads, inner))
    assert outline(analysed(model, tokens())[1]) == expected
    assert moved(model, (tokens().double(),)) < 1e-12


class EmptyPrefix(nn.Module):
    """No token of so many is in front of what is rotated; the prefix is cut off and put back all the same."""

    def __init__(self, prefix):
        super().__init__()
        self.prefix = prefix
        self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        y = self.first(x)
        return self.last(torch.cat([y[:, : self.prefix], torch.tanh(y[:, self.prefix :])], 1))


@pytest.mark.parametrize("prefix", [0, 1])
def test_an_empty_part_of_a_concatenation_holds_nothing(prefix):
    model = randomise(EmptyPrefix(prefix))
    assert outline(analysed(model, tokens())[1]) == [(6, "free")]
    assert moved(model, (tokens().double(),)) < 1e-12


FREE, BLOCKS, DUAL = "free", "blockwise", "relabel only"

EXPECTED = {
    "mlp": [(9, FREE), (10, FREE)],
    "resnet": [(6, FREE), (6, FREE), (10, FREE), (10, FREE), (10, FREE), (16, FREE), (16, FREE)],
    "resnet_padded": [(4, FREE), (6, FREE), (6, FREE), (6, FREE), (10, FREE), (10, FREE), (16, FREE)],
    "grouped": [(8, BLOCKS), (8, FREE), (12, BLOCKS)],
    "depthwise": [(6, FREE), (8, FREE)],
    "multiplied": [(4, BLOCKS), (6, FREE), (8, BLOCKS)],
    "squeeze_excite": [(5, FREE), (6, FREE), (8, FREE)],
    "gated": [(9, FREE), (10, FREE)],
    "dense": [(4, FREE), (4, FREE), (4, FREE), (6, FREE)],
    "two_by_two": [(7, FREE), (12, FREE)],
    "attention_packed": [(12, BLOCKS), (12, FREE), (12, DUAL), (20, FREE)],
    "attention_separate": [(12, BLOCKS), (12, FREE), (12, DUAL), (20, FREE)],
    "attention_shared_key": [(4, FREE), (4, DUAL), (12, FREE), (20, FREE)],
    "attention_rotary": [(3, DUAL), (3, DUAL), (12, BLOCKS), (12, FREE), (20, FREE)],
    "attention_torch": [(12, BLOCKS), (12, FREE), (12, DUAL)],
    "norms": [(6, FREE), (8, BLOCKS), (10, FREE)],
    "unet": [(6, FREE), (6, FREE), (6, FREE), (8, FREE), (8, FREE), (8, FREE), (12, FREE)],
    "generator": [(8, FREE)],
    "transposed_groups": [(8, BLOCKS), (12, BLOCKS)],
    "mixer": [(7, FREE), (9, FREE), (10, FREE)],
    "pixel_shuffle": [(3, FREE), (8, FREE)],
    "graph": [(6, FREE), (10, FREE)],
    "layer_scale": [(8, FREE), (20, FREE)],
    "slices": [(4, FREE), (6, FREE)],
    "view": [(5, FREE), (11, FREE)],
    "lstm": [(6, FREE), (7, FREE), (9, FREE)],
    "custom": [(7, FREE), (9, FREE)],
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_spaces_of_the_zoo(name):
    model, sample = ZOO[name]()
    _, spaces = analysed(randomise(model), sample)
    assert outline(spaces) == EXPECTED[name]


def test_reasons_and_ties():
    model, sample = ZOO["attention_packed"]()
    _, spaces = analysed(model, sample)
    by = {space.legality: space for space in spaces.spaces}
    assert by[BLOCKS].tie == by[DUAL].tie is not None
    assert by[BLOCKS].blocks.shape == by[DUAL].blocks.shape == (3, 4)
    assert by[BLOCKS].reason == "its features move in whole blocks"
    assert by[DUAL].reason == "two activations are multiplied and summed over it: both sides share one map"
    assert by[FREE].reason == ""


def test_barriers_have_a_reason():
    model, sample = ZOO["custom"]()
    labelling, spaces = analysed(model, sample)
    (barrier,) = labelling.barriers
    assert barrier.reason.startswith("`swirl` (node `swirl`")
    assert barrier.reason.endswith("has no rule")
    assert (barrier.reason, "barrier") in spaces.pins.values()


def test_no_barriers_elsewhere():
    for name, make in ZOO.items():
        labelling, _ = analysed(*make())
        assert bool(labelling.barriers) == (name == "custom"), name


class WritesIntoParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("cache", torch.zeros(2, 5))

    def forward(self, x):
        self.cache[:, 1:4] = torch.relu(self.first(x))[:, 1:4]
        return self.second(self.cache + 0)


def test_writing_into_a_buffer_is_a_barrier():
    labelling = label(trace(WritesIntoParameter(), torch.randn(2, 4)), RULES)
    assert [b.call for b in labelling.barriers] == ["copy_"]
    assert labelling.barriers[0].reason.startswith("`copy_` (node `setitem`")
    assert labelling.barriers[0].reason.endswith("writes it into a part of another tensor")


def test_pins_name_the_output_first():
    labelling, spaces = analysed(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3))
    assert spaces.pin_of(labelling.params["2.weight"].fields[0]) == ("it is the model's output", "output")
    reason, kind = spaces.pin_of(labelling.params["0.weight"].fields[1])
    assert (reason, kind) == ("`addmm` meets it with values that carry no feature (node `_0`, module `0`)", "fixed")
    assert spaces.pin_of(labelling.params["0.weight"].fields[0]) is None


def test_part_of_a_graph():
    """Without the head's nodes, the last features are free: nothing pins them as output."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    labelling, _ = analysed(model, torch.randn(5, 3))
    names = [node.name for node in labelling.program.module.graph.nodes]
    assert outline(solve(labelling, names[:-1])) == [(2, FREE), (4, FREE)]
    assert outline(solve(labelling, names)) == [(4, FREE)]


def test_pinned_by_the_caller():
    labelling, spaces = analysed(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3))
    pinned = dict.fromkeys(labelling.params["0.bias"].fields[0].tolist(), "the caller says so")
    spaces = solve(labelling, pinned=pinned)
    assert outline(spaces) == []
    assert spaces.pin_of(labelling.params["0.weight"].fields[0]) == ("the caller says so", "fixed")


def test_unused_rows_are_no_features():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(32, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(x + self.table.weight[: x.shape[1]])

    _, spaces = analysed(Positions(), tokens())
    assert outline(spaces) == []


def test_layout_counts_occurrences():
    labelling, spaces = analysed(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)), torch.randn(2, 3, 4, 4)
    )
    layout = spaces.layout(labelling.params["2.weight"].fields[1])
    assert layout.space.tolist() == [0] * 16
    assert layout.feature.tolist() == [c for c in range(4) for _ in range(4)]
    assert layout.occurrence.tolist() == [0, 1, 2, 3] * 4


def test_in_place_forms_agree():
    """Two ways to write the same: slices of zeros, and concatenation."""

    class Joined(nn.Module):
        def __init__(self, written):
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1), head(9)
            self.written = written

        def forward(self, x):
            if not self.written:
                return self.head(torch.cat([self.first(x), self.second(x)], 1))
            out = x.new_zeros(x.shape[0], 9, *x.shape[2:])
            out[:, :4] = self.first(x)
            out[:, 4:].copy_(self.second(x))
            out[:, 4:] *= 2
            return self.head(out)

    assert outline(analysed(Joined(True), image())[1]) == outline(analysed(Joined(False), image())[1])
    assert moved(randomise(Joined(True)), (image().double(),)) < 1e-12


def test_in_place_leaves_siblings_alone():
    class Siblings(nn.Module):
        def __init__(self):
            super().__init__()
            self.packed, self.head = nn.Linear(8, 12), nn.Linear(6, 3)

        def forward(self, x):
            a, b = self.packed(x).chunk(2, -1)
            a.mul_(2.0)
            a += b.tanh()
            return self.head(a * b)

    assert outline(analysed(Siblings(), tokens())[1]) == [(6, FREE)]
    assert moved(randomise(Siblings()), (tokens().double(),)) < 1e-12


@pytest.mark.parametrize("block", range(4))
def test_random_networks(block):
    for seed in range(10 * block, 10 * block + 10):
        model, sample = random_network(seed)
        assert moved(randomise(model, seed), doubled(sample), seed) < 1e-10, seed


def test_blocks_that_were_merged_and_then_held_are_told_apart():
    model, sample = random_network(910)
    _, error, pinned = self_check(label(trace(randomise(model, 910), sample), RULES))
    assert error < 1e-9
    assert not pinned


def test_slices_without_rows():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = self.first(x)
            marks = torch.zeros(4, 4)
            for rows in (slice(0, -4), slice(-4, -2), slice(-2, None)):
                marks[rows, rows] = 1.0
                h = h + 0 * h[rows].sum() + 0 * h[rows][..., :0].sum()
            return self.head(torch.relu(h)) + marks[:0].sum()

    assert moved(randomise(Sliced()), (torch.randn(4, 6, dtype=torch.float64),)) < 1e-12


def test_calls_on_no_rows():
    """Experts that no input goes to run on empty tensors."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.expert, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.relu(self.first(x))
            for rows in (torch.where(x[:, 0] > 99)[0], torch.where(x[:, 0] < 99)[0]):
                mine = h[rows]
                mine = mine * torch.sigmoid(self.expert(mine)) + mine
                h = torch.index_add(torch.zeros_like(h), 0, rows, torch.cat([mine[:, :4], mine[:, 4:]], 1)) + h
            return self.head(h)

    assert moved(randomise(Routed()), (torch.randn(4, 6, dtype=torch.float64),)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("block", [*range(4), *(pytest.param(n, marks=pytest.mark.hours) for n in range(4, 10))])
def test_a_thousand_random_networks(block):
    for seed in range(100 * block, 100 * block + 100):
        model, sample = random_network(seed)
        _, error, pinned = self_check(label(trace(randomise(model, seed), sample), RULES))
        assert error < 1e-9, seed
        assert not pinned, seed
