"""What `data` may be: every form is read as what it is, or refused by an error that says what was found."""

import itertools
import re
from collections import OrderedDict, UserDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fxzip
from fxzip.calibration import data_forms as sources
from fxzip.calibration.sources import Calibration, PerModel
from fxzip.errors import DataError, OptionError
from fxzip.tracing.calls import as_call

SAMPLE = torch.zeros(2, 3)
IMAGES = torch.zeros(2, 3, 4, 4)


def batch(value, rows=4):
    return torch.full((rows, 3), float(value))


def read(data, sample=SAMPLE, **options):
    return [(number, call) for number, call in calibrated(data, sample, **options)("x").by_source()]


def calibrated(data, sample=SAMPLE, models=2, **options):
    return Calibration.of(data, as_call(sample), models, False, **options)


def values(data, sample=SAMPLE, **options):
    return [call.args[0].flatten()[0].item() for _, call in read(data, sample, **options)]


def refuses(message, data, sample=SAMPLE, error=DataError, **options):
    with pytest.raises(error, match=re.escape(message)):
        read(data, sample, **options)


class Batches(Dataset):
    """A dataset whose items are batches; it does not say where it ends but by its length."""

    def __init__(self, count, item=batch):
        self.count, self.item = count, item

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        return self.item(number)


class Stream(IterableDataset):
    def __init__(self, item=batch):
        self.item = item

    def __iter__(self):
        return (self.item(number) for number in itertools.count())


@pytest.mark.parametrize("data", [
    Stream(), DataLoader(Stream(lambda k: batch(k)[0]), 4), itertools.cycle([batch(0), batch(1)]),
    (batch(k) for k in itertools.count()), iter(Stream()),
])  # fmt: skip
def test_what_has_no_end_is_bounded_and_a_note_says_so(data):
    calibration = calibrated(data, max_batches=3)
    assert [len(list(calibration("x"))) for _ in range(2)] == [3, 3]
    assert calibration.notes == [
        "`max_batches` was reached: 3 batches of `data` were read, what it holds beyond was not"
    ]


def test_a_pass_over_an_iterator_reads_no_further_than_the_bound():
    data = iter([batch(k) for k in range(5)])
    list(calibrated(data, max_batches=3)("x"))
    assert next(data)[0, 0] == 3


@pytest.mark.parametrize("data", [[batch(k) for k in range(3)], DataLoader(torch.zeros(12, 3), 4), Batches(3)])
def test_what_ends_at_the_bound_needs_no_note(data):
    calibration = calibrated(data, max_batches=3)
    assert len(list(calibration("x"))) == 3
    assert not calibration.notes


def test_the_bound_goes_for_each_source():
    data = PerModel((batch(k) for k in range(9)), [batch(k) for k in range(9)])
    assert [number for number, _ in read(data, max_batches=2)] == [0, 0, 1, 1]


@pytest.mark.parametrize("bound", [0, -1, 2.5, True, None])
def test_a_bound_that_is_none(bound):
    refuses("`max_batches` must be a whole number of at least 1", [batch(0)], error=OptionError, max_batches=bound)
    refuses("`max_batches` must be a whole number of at least 1", None, error=OptionError, max_batches=bound)


def test_of_an_iterator_only_so_many_bytes_are_kept(monkeypatch):
    monkeypatch.setattr(sources, "KEPT", 100)
    calibration = calibrated(batch(k) for k in itertools.count())
    assert [len(list(calibration("x"))) for _ in range(2)] == [3, 3]
    assert "can be read only once" in calibration.notes[0]


def test_a_pass_that_was_left_early_loses_nothing():
    calibration = calibrated(batch(k) for k in range(4))
    next(iter(calibration("x")))
    assert [call.args[0][0, 0].item() for call in calibration("x")] == [0, 1, 2, 3]


def test_an_iterator_that_was_used_up_is_named():
    used = (batch(k) for k in range(2))
    list(used)
    refuses("An iterator can be read only once: one that an earlier call has used up is empty.", used)


def test_what_can_be_read_only_once_and_does_not_say_so_is_named():
    class Once:
        def __init__(self):
            self.rest = iter([batch(0), batch(1)])

        def __iter__(self):
            return self.rest

    calibration = calibrated(Once())
    assert len(list(calibration("x"))) == 2
    with pytest.raises(DataError, match=r"none at a later one: `Once` can be read only once"):
        list(calibration("x"))


@pytest.mark.parametrize("data", [Batches(3), TensorDataset(torch.arange(3.0)[:, None, None].expand(3, 4, 3))])
def test_a_dataset_of_batches_ends_at_its_length(data):
    assert values(data) == [0, 1, 2]


@pytest.mark.parametrize("data", [
    TensorDataset(torch.arange(130.0)[:, None].expand(130, 3), torch.zeros(130)),
    Batches(130, lambda k: (batch(k)[0], 7)), Batches(130, lambda k: batch(k)[0]),
])  # fmt: skip
def test_a_dataset_of_single_inputs_is_read_in_batches(data):
    calibration = calibrated(data)
    assert [call.args[0].shape for call in calibration("x")] == [(64, 3), (64, 3), (2, 3)]
    assert calibration.notes == ["`data` is a dataset of single inputs; they were read in batches of 64"]
    assert values(data) == [0, 64, 128]


def test_a_long_dataset_is_read_all_over():
    data = Batches(64 * 40, lambda k: (batch(k)[0], 7))
    found = torch.cat([call.args[0][:, 0] for _, call in read(data, max_batches=2)])
    assert torch.equal(found, torch.arange(128.0) * 20)


def test_a_dataset_of_dicts_is_read_in_batches():
    data = Batches(3, lambda k: {"x": batch(k)[0], "label": k})
    ((_, call),) = read(data, {"x": SAMPLE})
    assert call.kwargs["x"][:, 0].tolist() == [0, 1, 2]


def test_a_dataset_of_inputs_of_several_sizes_is_refused():
    refuses("The inputs of a dataset must make a batch", Batches(3, lambda k: torch.zeros(3, 4, 4 + k)), IMAGES)


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_sources_than_models(count):
    refuses(f"one source of batches for each of the 2 models; found {count}.", PerModel(*[[batch(0)]] * count))
    loaders = [DataLoader(torch.zeros(8, 3), 4)] * count
    refuses(f"for each of the 2 models; found {count} sources.", loaders)


@pytest.mark.parametrize(("data", "sample"), [
    ([[batch(0), batch(1)], [batch(2), batch(3)]], SAMPLE),
    (([batch(0), batch(1)], [batch(2)]), SAMPLE),
    ([(batch(0), batch(1)), (batch(2), batch(3))], SAMPLE),
    ([[(batch(0), 0), (batch(1), 1)], [(batch(2), 2), (batch(3), 3)]], SAMPLE),
    ([[np.zeros((4, 3)), np.zeros((4, 3))], [np.zeros((4, 3))]], SAMPLE),
    ([[(batch(0), batch(1)), (batch(2), batch(3))], [(batch(4), batch(5))]], (SAMPLE, SAMPLE)),
])  # fmt: skip
def test_what_could_be_batches_or_sources_is_refused(data, sample):
    refuses("two batches with targets, or the batches of two models. Pass `fxzip.PerModel(", data, sample)


def test_what_can_only_be_batches_is_batches():
    assert values([(batch(0), torch.zeros(4)), (batch(1), torch.zeros(4))]) == [0, 1]
    assert values([(batch(0), batch(7)), (batch(1), batch(8)), (batch(2), batch(9))]) == [0, 1, 2]
    pairs = read([(batch(0), batch(1)), (batch(2), batch(3))], (SAMPLE, SAMPLE))
    assert [call.args[1][0, 0].item() for _, call in pairs] == [1, 3]
    keywords = read([({"x": batch(0)}, 1), ({"x": batch(1)}, 2)], {"x": SAMPLE})
    assert [(number, call.kwargs["x"][0, 0].item()) for number, call in keywords] == [(0, 0), (0, 1)]


def test_what_can_only_be_sources_is_sources():
    loader = DataLoader(torch.ones(4, 3), 4)
    assert [number for number, _ in read([loader, [batch(0), batch(1)]])] == [0, 1, 1]
    lists = [[{"x": batch(0)}, {"x": batch(1)}], [{"x": batch(2)}]]
    assert [number for number, _ in read(lists, {"x": SAMPLE})] == [0, 0, 1]


@pytest.mark.parametrize(("item", "sample"), [
    ((torch.zeros(4, dtype=torch.int64), IMAGES), IMAGES),
    ([torch.zeros(4), IMAGES], IMAGES),
    ((torch.zeros(4, 10), IMAGES, torch.zeros(4)), IMAGES),
    ((torch.zeros(4, dtype=torch.int64), torch.zeros(4, 3)), SAMPLE),
    ((np.zeros(4, dtype=np.int64), np.zeros((4, 3), dtype=np.float32)), SAMPLE),
])  # fmt: skip
def test_labels_in_front_of_inputs_are_named(item, sample):
    refuses("must start with the inputs", [item], sample)
    refuses("item 1 looks like the inputs. Let `data` yield the inputs first", [item], sample)


def test_labels_in_front_of_a_dict_are_named():
    refuses("item 0 is (4,), item 1 a dict", [(torch.zeros(4), {"x": batch(0)})], {"x": SAMPLE})


@pytest.mark.parametrize(("data", "message"), [
    ([{"pixels": batch(0), "label": torch.zeros(4)}], "Let `data` yield the inputs alone, e.g. `(b['pixels'] for b in"),
    ([{"label": torch.zeros(4)}], "Let `data` yield the inputs alone; or pass a dict as `sample_input`"),
    ([batch(0)[0], batch(1)[0]], "2 dimensions are needed, the first of them the batch. Pass a DataLoader"),
    ([batch(0)[None]], "has shape (1, 4, 3); the models were traced with (2, 3): 2 dimensions are needed"),
    ([batch(0).to(torch.complex64)], "must have the kind of dtype of `sample_input`, torch.float32; found torch.compl"),
    ([batch(0, 0), batch(1, 0)], "`data` must yield at least one input; all of its batches (2) are empty."),
    ([None], "found `NoneType`"),
    ([batch(0).to("meta")], "must hold dense tensors with values; found one on the device `meta`. Let `data` yield"),
    ([batch(0).to_sparse()], "must hold dense tensors with values; found one of layout `torch.sparse_coo`."),
    ([torch.nested.nested_tensor([batch(0)[0], batch(0)[1]])], "must hold dense tensors with values; found a nested"),
    ([batch(0).tolist()], "Make tensors of the lists of numbers"),
    (PerModel(PerModel([batch(0)], [batch(1)]), [batch(2)]), "source of a `PerModel` must be an iterable of batches"),
    ("images", "`data` must be an iterable of batches; found `str`"),
    (3, "`data` must be an iterable of batches; found `int`"),
    ([], "`data` must yield at least one batch; it gave none."),
])  # fmt: skip
def test_other_forms_are_refused_with_a_way_out(data, message):
    refuses(message, data)


def test_a_tokenizers_lists_are_named_in_short():
    sample = {"ids": torch.zeros(2, 6, dtype=torch.int64)}
    message = "found {'ids': a `list` of 40 that starts with [`int`, `int`, `int`, `int`, `int`, `int`]}. Make tensors"
    refuses(message, [{"ids": [[1] * 6] * 40}], sample)


def test_a_dataset_that_has_no_length_may_raise_what_it_likes():
    class Stream(Dataset):
        def __len__(self):
            raise RuntimeError("unknown")

        def __iter__(self):
            return iter([batch(0), batch(1)])

    assert values(Stream()) == [0, 1]


def network(classes):
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, classes))


class Table(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, classes)

    def forward(self, ids):
        return self.head(self.table(ids).mean(1))


@pytest.mark.parametrize(("build", "batches", "message"), [
    (network, [torch.randn(32, 3), torch.randn(32, 4)], "Batch 1 of `data` has shape (2, 4); the models were traced"),
    (Table, [torch.full((32, 5), 20)], "Numbers must be below the length of the tables that they are looked up in"),
    (Table, [torch.zeros(32, 5, dtype=torch.uint8)], "models were traced with (2, 5): Expected tensor for"),
])  # fmt: skip
@pytest.mark.parametrize("hold_out", [True, False])
def test_batches_that_the_models_do_not_take_are_named_wherever_they_are_met_first(build, batches, message, hold_out):
    sample = torch.zeros(2, 5, dtype=torch.int64) if build is Table else SAMPLE
    with pytest.raises(DataError, match=re.escape(message if hold_out else message.replace("(2, 4)", "(32, 4)"))):
        fxzip.compile_zip(build(2), build(3), sample, data=batches, hold_out=hold_out, progress=False)


def test_empty_batches_are_passed_over():
    assert values([batch(0), batch(1, 0), batch(2)]) == [0, 2]


def test_arrays_are_tensors():
    first, second = np.full((4, 3), 1.0), np.full((4, 3), 2.0, dtype=np.float32)[::-1]
    second.flags.writeable = False
    calls = [call for _, call in read([first, (second, np.zeros(4))])]
    assert [call.args[0][0, 0].item() for call in calls] == [1, 2]
    assert all(call.args[0].dtype == torch.float32 for call in calls)
    assert [call.kwargs["x"].shape for _, call in read([{"x": first}], {"x": SAMPLE})] == [(4, 3)]
    assert values(first) == [1]


def test_masks_of_either_kind_are_taken():
    sample = {"x": SAMPLE, "mask": torch.ones(2, 3, dtype=torch.bool)}
    ((_, call),) = read([{"x": batch(0), "mask": torch.tensor([[0, 1, 2]] * 4)}], sample)
    assert call.kwargs["mask"].tolist() == [[False, True, True]] * 4


def test_floats_are_brought_to_the_dtype_of_the_sample():
    assert [call.args[0].dtype for _, call in read([batch(0).half(), batch(1).double()])] == [torch.float32] * 2


def test_every_entry_takes_the_bound():
    a, b = network(2), network(2)
    note = "`max_batches` was reached: 2 batches of `data` were read, what it holds beyond was not"

    def endless():
        return (torch.randn(40, 3) for _ in itertools.count())

    zipped = fxzip.compile_zip(a, b, SAMPLE, data=endless(), max_batches=2, progress=False)
    assert note in zipped.report["notes"]
    table = fxzip.compare([a, b], SAMPLE, data=endless(), methods=["permute"], max_batches=2, progress=False)
    assert not any(row["error"] for row in table)
    assert len(fxzip.sweep([a, b], SAMPLE, data=endless(), max_batches=2, progress=False)) > 1
    line = fxzip.barrier(a, b, SAMPLE, data=endless(), loss=lambda _: 0.0, points=3, max_batches=2, progress=False)
    assert line.height == 0


def test_a_generator_gives_the_zip_of_the_list():
    a, b = network(2), network(3)
    batches = [torch.randn(40, 3) for _ in range(3)]
    zips = [fxzip.compile_zip(a, b, SAMPLE, data=data, progress=False) for data in (batches, iter(batches))]
    for first, second in zip(*(z(batches[0]) for z in zips), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("row", [3, 7])
def test_what_is_not_finite_in_the_data_is_named(row):
    """Among the inputs that are fitted on, and among those held out: input 7 of batch 1 is."""
    broken = torch.randn(40, 3)
    broken[row, 1] = float("nan")
    with pytest.raises(DataError, match=r"on batch 1 of `data`.* The batch itself holds 1 that is not finite\."):
        fxzip.compile_zip(network(2), network(3), SAMPLE, data=[torch.randn(40, 3), broken], progress=False)


class Holder(OrderedDict):
    """As batches of other libraries are: items, and more that models may ask for."""

    @property
    def pixels(self):
        return self["pixels"]


@pytest.mark.parametrize(
    "made",
    [OrderedDict, dict, UserDict, Holder, namedtuple("Batch", "pixels"), SimpleNamespace],
    ids=lambda made: made.__name__,
)
def test_data_are_in_the_containers_that_models_take(made):
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, batch):
            x = batch["pixels"] if made in (dict, OrderedDict, UserDict) else batch.pixels
            return self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    a, b = Takes().eval(), Takes().eval()
    images = [torch.randn(32, 6) for _ in range(3)]
    data = [(made(pixels=x), torch.zeros(32)) for x in images]
    zipped = fxzip.compile_zip(a, b, (made(pixels=images[0]),), data=data, progress=False)
    plain = fxzip.compile_zip(
        *(nn.Sequential(net.a, nn.ReLU(), net.b) for net in (a, b)), images[0], data=images, progress=False
    )
    torch.testing.assert_close(zipped(made(pixels=images[1])), plain(images[1]))


def test_tensors_of_a_class_of_their_own_are_their_values():
    class Image(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.sub_:
                raise TypeError("an image is not subtracted from")
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(64, 8)
    models = [nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, n)) for n in (2, 3)]
    expected = fxzip.compile_zip(*models, x, data=[x], progress=False)(x)
    torch.testing.assert_close(
        fxzip.compile_zip(*models, x, data=[x.as_subclass(Image)], progress=False)(x), expected, rtol=0, atol=0
    )
