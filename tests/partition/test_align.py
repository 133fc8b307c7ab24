"""Alignment: the same computation is found whatever weights, widths, names and order; different ones are not."""

import copy

import pytest
import torch
from models import randomise
from models.networks import Mixed, Residual
from torch import Tensor, nn

import fxzip
from fxzip.partition.alignment import attribute


def aligned(*models, sample):
    return fxzip.partition.align([fxzip.tracing.trace(model, sample) for model in models])


class Branches(nn.Module):
    """Two branches and a sum; `swapped` names and computes them in the other order."""

    def __init__(self, swapped: bool = False, stride: int = 1, width: int = 6) -> None:
        super().__init__()
        self.swapped = swapped
        one, two = nn.Conv1d(3, width, 3, stride, 1), nn.Conv1d(3, width, 1, stride)
        if swapped:
            self.z, self.a = two, one
        else:
            self.narrow, self.wide = one, two
        self.last = nn.Conv1d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.swapped:
            right = self.z(x)
            left = self.a(x).relu()
        else:
            left = self.narrow(x).relu()
            right = self.wide(x)
        return self.last(left + right)


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def test_names_order_and_widths_do_not_matter():
    found = aligned(Branches(), Branches(swapped=True, width=9), sample=X)
    assert found.pairs["narrow"] == ("narrow", "a")
    assert found.pairs["wide"] == ("wide", "z")
    assert found.pairs["last"] == ("last", "last")
    assert found.params["narrow.weight"] == ("narrow.weight", "a.weight")
    assert found.parting == ("",)


def test_a_model_aligns_with_itself_node_by_node():
    model = randomise(Residual())
    found = aligned(model, model, sample=torch.randn(2, 3, 8, 8))
    nodes = [node.name for node in found.programs[0].module.graph.nodes if node.op != "output"]
    assert found.pairs == {name: (name, name) for name in nodes}
    assert all(ours == theirs for ours, theirs in found.params.values())


def test_settings_that_are_no_widths_matter():
    found = aligned(Branches(), Branches(stride=2), sample=X)
    assert set(found.pairs) == {"x"}
    assert found.parting[0].startswith("calls `Conv1d` (`narrow`), ")


def test_only_what_all_models_have_in_common_and_what_it_is_computed_from():
    found = aligned(
        nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.Tanh()),
        nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh()),
        sample=torch.randn(2, 4),
    )  # fmt: skip
    assert [len(names) for names in found.pairs.values()] == [3, 3]
    assert len(found.pairs) == 2


def test_ties_must_agree():
    tied, untied = Mixed(), Mixed()
    untied.decode.weight = nn.Parameter(torch.randn(20, 10))
    sample = (torch.randn(2, 3, 8, 8), torch.randint(0, 20, (2, 5)))
    assert "decode" in aligned(tied, Mixed(), sample=sample).pairs
    for pair in ((tied, untied), (untied, tied)):
        assert "decode" not in aligned(*pair, sample=sample).pairs


class Indexed(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)[:, self.order])


@pytest.mark.parametrize(("order", "equal"), [((2, 0, 1), True), ((0, 1, 2), False)])
def test_integer_buffers_must_hold_the_same_values(order, equal):
    found = aligned(Indexed(2, 0, 1), Indexed(*order), sample=torch.randn(2, 4))
    assert ("last" in found.pairs) == equal
    assert "first" in found.pairs


def test_where_models_part_is_said_in_words():
    a, b = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    assert aligned(a, b, sample=torch.randn(2, 4)).parting == ("ends, the other calls `ReLU` (`1`)",)
    assert aligned(b, a, sample=torch.randn(2, 4)).parting == ("calls `ReLU` (`1`), the other ends",)


def test_where_models_part_in_what_looks_alike_the_difference_is_said():
    sample = torch.randn(2, 4)
    found = aligned(Indexed(2, 0, 1), Indexed(2, 1, 0), sample=sample).parting[0]
    assert "reads `order`: 2 of 3 values differ, the first at [1]: 0 and 1; integers" in found
    longer = Picked(2, 0, 1)
    longer.order = torch.tensor([[2, 0, 1]])
    assert "the shapes are (3,) and (1, 3)" in aligned(Picked(2, 0, 1), longer, sample=sample[:, :3]).parting[0]
    strides = [nn.Sequential(nn.Conv1d(3, width, 1, n)) for width, n in ((5, 1), (6, 2))]
    assert aligned(*strides, sample=X).parting[0].endswith("calls `Conv1d` (`0`): `stride` is (1,) and (2,)")
    rolled = [nn.Sequential(nn.Linear(8, 3), nn.Flatten(n)) for n in (1, 2)]
    assert aligned(*rolled, sample=X).parting[0].endswith("`start_dim` is 1 and 2")


class Picked(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x[:, self.order])))


class Switched(nn.Module):
    """Reads a single number that is no weight."""

    def __init__(self, number: int | bool) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), nn.Linear(8, 2)
        self.register_buffer("number", torch.tensor(number))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.where(self.number > 0, h.relu(), h.tanh()) * self.number)


@pytest.mark.parametrize("numbers", [(1, 3), (True, False)])
def test_single_integers_are_constants_but_where_a_layer_counts_its_batches(numbers):
    models = [Switched(number).eval() for number in numbers]
    models[0].first[1].num_batches_tracked.fill_(7)
    found = aligned(*models, sample=torch.randn(3, 4))
    assert f"1 of 1 values differ, the first at []: {numbers[0]} and {numbers[1]}; integers" in found.parting[0]
    assert "first_1" in found.pairs
    assert aligned(models[0], copy.deepcopy(models[0]), sample=torch.randn(3, 4)).parting == ("",)


def test_where_nothing_is_shared_the_difference_and_a_way_out_are_said():
    models, x = [Picked(2, 0, 1), Picked(2, 1, 0)], torch.randn(20, 3)
    with pytest.raises(fxzip.AlignError, match=r"2 of 3 values differ, .*: 0 and 1; .* nothing at all \(`until=0`\)"):
        fxzip.compile_zip(models, x, data=[x], progress=False)
    zipped = fxzip.compile_zip(models, x, data=[x], until=0, progress=False)
    for model, found in zip(models, zipped(x), strict=True):
        torch.testing.assert_close(found, model(x))


def test_attribute_follows_a_dotted_path():
    model = Residual()
    assert attribute(model, "layer1.0.conv1.weight") is model.layer1[0].conv1.weight
