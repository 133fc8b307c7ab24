"""Networks in folders: what is loaded is what was saved, and a folder that is not as it was saved is refused."""

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections import OrderedDict, namedtuple
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from models import randomise
from models import randomise as randomised
from models.networks import Mixed, torchvision_model
from models.zoo import ZOO
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_leaves

import fxzip
from fxzip.rewriting import serialization
from fxzip.rewriting.json_values import decoded, encoded
from fxzip.rewriting.module import EmittedModule
from fxzip.rewriting.stored_tensors import TensorTable, tensors_again
from fxzip.tracing.provenance import provenance_of

NAMES = ["model.safetensors", "graph.json", "report.json", "fxzip.json", "README.md"]


def mlp(outputs, middle=nn.ReLU):
    return nn.Sequential(nn.Linear(4, 6), middle(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, outputs)).eval()


def small(seed=0, **options):
    torch.manual_seed(seed)
    x = torch.randn(32, 4)
    return fxzip.compile_zip(mlp(2), mlp(3), x, data=[x], progress=False, **options), x


def outputs(network, *given):
    torch.manual_seed(3)
    with torch.no_grad():
        return [value for value in tree_leaves(network(*given)) if isinstance(value, torch.Tensor)]


def same(found, expected, *given):
    ours, theirs = outputs(found, *given), outputs(expected, *given)
    return len(ours) == len(theirs) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def again(network, folder, *given, trust=()):
    """Saved and loaded; everything that is visible of a network is the same."""
    fxzip.save(network, folder)
    found = fxzip.load(folder, trust=trust)
    assert sorted(path.name for path in Path(folder).iterdir()) == sorted(NAMES)
    assert same(found, network, *given)
    assert found.code == network.code
    assert [provenance_of(n) for n in found.graph.nodes] == [provenance_of(n) for n in network.graph.nodes]
    assert list(found.state_dict()) == list(network.state_dict())
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in network.parameters()]
    assert [(n, type(m), m.training, m.extra_repr()) for n, m in found.named_modules() if n] == [
        (n, type(m), m.training, m.extra_repr()) for n, m in network.named_modules() if n
    ]
    assert found.training == network.training
    if "fxzip_report" in network.meta:
        assert dict(found.report) == dict(network.report)
        assert str(found.report) == str(network.report)
    return found


def pair(make, seed=0):
    torch.manual_seed(seed)
    (a, x), (b, _) = make(), make()
    return randomise(a, 0), randomise(b, 1), x if isinstance(x, tuple) else (x,)


def zipped(a, b, given, **options):
    sample = given if len(given) > 1 else given[0]
    return fxzip.compile_zip(a, b, sample, data=[sample], progress=False, **options)


FEW = ["two_by_two", "attention_torch", "norms", "lstm", "graph", "weight_norm", "slices"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in FEW else [pytest.mark.slow, pytest.mark.thinned(2)])
        for n in ZOO
        if n not in ("einsum", "custom")
    ],
)
def test_a_network_comes_back_to_the_bit(name, tmp_path):
    a, b, given = pair(ZOO[name])
    network = zipped(a, b, given, refit="batchnorm")
    found = again(network, tmp_path / "zip", *given)
    again(found, tmp_path / "twice", *given)
    again(network.single(1), tmp_path / "one", *given)


class Encoder(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, outputs)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


def test_an_encoder_layer_comes_back(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    network = zipped(Encoder(2).eval(), Encoder(3).eval(), (x,), refit="batchnorm")
    again(network, tmp_path / "zip", x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxzip.FxzipWarning)  # attention is traced in eval mode
        again(network.train(), tmp_path / "training", x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_networks_of_torchvision_come_back(name, tmp_path):
    x = torch.randn(2, 3, 32, 32)
    network = zipped(torchvision_model(name, 0), torchvision_model(name, 1), (x,), refit=None, method="average")
    again(network, tmp_path / "zip", x)


@pytest.mark.slow
def test_networks_of_timm_come_back(tmp_path):
    timm = pytest.importorskip("timm")
    x = torch.randn(2, 3, 160, 160)
    a, b = (randomised(timm.create_model("test_vit", drop_path_rate=0.1), seed) for seed in range(2))
    again(zipped(a, b, (x,), refit=None), tmp_path / "zip", x)


@pytest.mark.slow
def test_networks_of_transformers_come_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50,
        max_position_embeddings=32,
    )  # fmt: skip
    a, b = (transformers.BertForSequenceClassification(config).eval() for _ in range(2))
    sample = {"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    network = fxzip.compile_zip(a, b, sample, data=[sample], progress=False, refit=None)
    fxzip.save(network, tmp_path / "zip")
    found = fxzip.load(tmp_path / "zip")
    ours, theirs = found(**sample), network(**sample)
    assert [type(own) for own in ours] == [type(own) for own in theirs]
    assert all(torch.equal(own.logits, other.logits) for own, other in zip(ours, theirs, strict=True))


OPTIONS = [
    {}, {"width": "auto", "budget": "flops"}, {"refit": "repair"},
    {"method": fxzip.baselines.Recover(fxzip.Zip()), "refit": None, "until": "2"},
    {"method": fxzip.Energy(), "refit": None, "until": "2"}, {"start": "2"},
    {"until": "auto", "max_cost": 1.9, "budget": "flops"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_whatever_the_options_are_it_comes_back(options, tmp_path):
    network, x = small(**options)
    found = again(network, tmp_path / "zip", x)
    again(found.single(0), tmp_path / "one", x)


def test_tasks_joint_heads_and_inputs_of_their_own(tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(32, 4), torch.randn(32, 4) + 1
    network = fxzip.compile_zip(
        {"pets": mlp(2), "birds": mlp(3)}, x, data=fxzip.PerModel([x], [y]), joint=True, progress=False
    )
    found = again(network, tmp_path / "zip", x)
    assert found.tasks == ("pets", "birds")
    assert list(found(x)) == ["pets", "birds"]
    assert torch.equal(found.single("birds")(x), network(x)["birds"])
    assert json.loads((tmp_path / "zip" / "fxzip.json").read_text())["tasks"] == ["pets", "birds"]
    apart = fxzip.compile_zip(mlp(2), mlp(3), fxzip.PerModel(x, y), data=[(x, y)], start="2", progress=False)
    again(apart, tmp_path / "apart", x, y)
    again(fxzip.side_by_side([mlp(2), mlp(3)], x), tmp_path / "side", x)


def test_several_inputs_and_ties_come_back(tmp_path):
    torch.manual_seed(0)
    given = torch.randn(2, 3, 8, 8), torch.randint(0, 20, (2, 5))
    network = zipped(randomised(Mixed(3), 0), randomised(Mixed(4), 1), given, refit="batchnorm")
    found = again(network, tmp_path / "zip", *given)
    assert {name: id(p) for name, p in found.named_parameters()}.keys() == dict(network.named_parameters()).keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_come_back(dtype, tmp_path):
    network, x = small()
    again(network.to(dtype), tmp_path / "zip", x.to(dtype))


def test_a_loaded_network_is_a_network_like_any_other(tmp_path):
    network, x = small()
    found = again(network, tmp_path / "zip", x)
    exported = torch.export.export(found, (x,)).module()
    assert all(map(torch.equal, exported(x), found(x)))
    optimiser = torch.optim.SGD(found.parameters(), lr=0.1)
    before = (found(x)[0] - 1).square().mean()
    before.backward()
    optimiser.step()
    assert (found(x)[0] - 1).square().mean() < before
    assert same(network, fxzip.load(tmp_path / "zip"), x)  # what was saved stays
    twice = fxzip.compile_zip(found.single(0), fxzip.load(tmp_path / "zip").single(1), x, data=[x], progress=False)
    again(twice, tmp_path / "twice", x)
    again(found, tmp_path / "zip", x)


def test_another_process_needs_no_code_of_the_models(tmp_path):
    a, b, given = pair(ZOO["attention_rotary"])
    network = zipped(a, b, given, refit="batchnorm")
    network.save_pretrained(tmp_path / "zip")
    save_file({"x": given[0], **{str(k): y.contiguous() for k, y in enumerate(network(*given))}}, tmp_path / "seen")
    code = (
        "import sys, torch, fxzip; from safetensors.torch import load_file;"
        "torch.set_num_threads(int(sys.argv[3]));"  # bits depend on it
        "seen = load_file(sys.argv[2]); network = fxzip.load(sys.argv[1]);"
        "assert all(torch.equal(y, seen[str(k)]) for k, y in enumerate(network(seen['x'])));"
        "assert 'zoo' not in sys.modules; print(network.report)"
    )
    paths = {**os.environ, "PYTHONPATH": str(Path(fxzip.__file__).parent.parent)}
    command = [sys.executable, "-c", code, str(tmp_path / "zip"), str(tmp_path / "seen"), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, env=paths, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(network.report).strip()


# functions, classes and settings


@torch.fx.wrap
def tripled(x):
    return 3 * x


class Tripled(nn.Module):
    def forward(self, x):
        return tripled(x)


def test_functions_of_ones_own_are_for_who_names_them(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    network = zipped(mlp(2, Tripled), mlp(3, Tripled), (x,), refit=None)
    fxzip.save(network, tmp_path / "zip")
    with pytest.raises(fxzip.LoadError, match=r"`graph.json` cannot be read: it calls '.*tripled'.*trust=\[tripled\]"):
        fxzip.load(tmp_path / "zip")
    assert same(fxzip.load(tmp_path / "zip", trust=[tripled]), network, x)
    assert same(fxzip.load(tmp_path / "zip", trust=tripled), network, x)
    with fxzip.trust(tripled):
        assert same(fxzip.load(tmp_path / "zip"), network, x)
    assert "trust=[test_serialization.tripled]" in (tmp_path / "zip" / "README.md").read_text()
    with pytest.raises(fxzip.InputError, match="`trust` takes functions and classes; found 3"):
        fxzip.load(tmp_path / "zip", trust=[3])


def test_operations_of_ones_own_are_for_who_names_them(tmp_path):
    a, b, given = pair(ZOO["custom"])
    network = zipped(a, b, given, refit=None)
    fxzip.save(network, tmp_path / "zip")
    with pytest.raises(fxzip.LoadError, match="swirl"):
        fxzip.load(tmp_path / "zip")
    again(network, tmp_path / "zip", *given, trust=[torch.ops.fxzip_tests.swirl])


class Leaf(nn.Linear):
    scale = 2.0

    def forward(self, x):
        return super().forward(x) * self.scale * self.own[0]


def held(leaf, x):
    """A network whose only module is that leaf."""
    graph = torch.fx.Graph()
    y = graph.call_module("body.leaf", (graph.placeholder("x"),))
    graph.output(y)
    root = nn.Module()
    root.body = nn.Module()
    root.body.leaf = leaf
    return EmittedModule(root, graph)


def test_classes_of_ones_own_are_for_who_names_them(tmp_path):
    leaf, x = Leaf(3, 2), torch.randn(2, 3)
    leaf.own = (0.5, None, {"a": [math.inf, 1j], 3: torch.float16}, nn.functional.relu)
    network = held(leaf, x)
    fxzip.save(network, tmp_path / "zip")
    with pytest.raises(fxzip.LoadError, match=r"modules of the class 'test_serialization.Leaf'"):
        fxzip.load(tmp_path / "zip")
    found = again(network, tmp_path / "zip", x, trust=[Leaf])
    assert found.body.leaf.own == leaf.own


def test_what_cannot_be_stored_is_named_before_anything_is_written(tmp_path):
    x = torch.randn(2, 3)
    leaf = nn.Linear(3, 2)
    leaf.rule = lambda value: value
    with pytest.raises(fxzip.SaveError, match=r"Attribute `rule` of module `body.leaf` cannot be stored: .*no name"):
        fxzip.save(held(leaf, x), tmp_path / "zip")
    leaf.rule = object()
    with pytest.raises(fxzip.SaveError, match=r"`rule` of module `body.leaf` cannot be stored: a `builtins.object`"):
        fxzip.save(held(leaf, x), tmp_path / "zip")
    leaf.rule = b"bytes"
    with pytest.raises(fxzip.SaveError, match=r"`rule` of module `body.leaf`"):
        fxzip.save(held(leaf, x), tmp_path / "zip")
    del leaf.rule
    hook = leaf.register_forward_hook(print)
    with pytest.raises(fxzip.SaveError, match=r"Module `body.leaf` has hooks"):
        fxzip.save(held(leaf, x), tmp_path / "zip")
    hook.remove()
    leaf.weight = nn.Parameter(torch.ones(2, 3).to_sparse())
    with pytest.raises(fxzip.SaveError, match=r"`weight` of module `body.leaf` cannot be stored: a tensor that is sp"):
        fxzip.save(held(leaf, x), tmp_path / "zip")
    with pytest.raises(fxzip.InputError, match="`save` takes a zipped network; found a `Linear`"):
        fxzip.save(leaf, tmp_path / "zip")
    assert not list(tmp_path.iterdir())


LEAVES = [
    nn.LSTM(3, 2, 2, bidirectional=True), nn.GRU(3, 2), nn.RNN(3, 2), nn.LSTM(3, 4, proj_size=2), nn.Embedding(5, 3, 1),
    nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"), nn.BatchNorm1d(3), nn.GroupNorm(1, 3), nn.Identity(),
    nn.MultiheadAttention(4, 2, kdim=3, vdim=3), nn.Dropout(0.2), nn.AdaptiveAvgPool2d((None, 2)), nn.Softmax(-1),
    nn.TransformerEncoderLayer(4, 2, 8), nn.Unflatten(1, (1, 3)), nn.Upsample(scale_factor=2.0), nn.RMSNorm(3),
    nn.BatchNorm1d(3, affine=False, track_running_stats=False), nn.PReLU(3), nn.Bilinear(2, 2, 3), nn.ZeroPad2d(1),
]  # fmt: skip


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: type(leaf).__name__)
def test_leaf_modules_come_back(leaf, tmp_path):
    network = held(leaf, None)
    for mode in (True, False):
        fxzip.save(network.train(mode), tmp_path / "zip")
        found = fxzip.load(tmp_path / "zip")
        for own, other in zip(found.body.modules(), network.body.modules(), strict=True):
            assert type(own) is type(other)
            assert vars(own).keys() == vars(other).keys()
            assert repr(own) == repr(other)
            assert own.training is mode
        assert [n for n, _ in found.named_buffers()] == [n for n, _ in network.named_buffers()]
        assert all(map(torch.equal, found.state_dict().values(), network.state_dict().values()))
    if isinstance(leaf, nn.RNNBase):
        x = torch.randn(4, 2, 3)
        assert torch.equal(found(x)[0], network(x)[0])
        assert found.double()(x.double())[0].dtype == torch.float64
        assert found.body.leaf._flat_weights[0] is found.body.leaf.weight_ih_l0


Point = namedtuple("Point", "x y")
VALUES = [
    None, True, 1, -(10**40), 0.1, -0.0, 1e-320, math.inf, -math.inf, "a", "$dict", "\ud800", (), (1,), [], [1, [2]],
    {}, {"a": (1, 2)}, {1: 2, (3, None): [4]}, {"$a": 1}, {"$tuple": []}, slice(None, 2), slice((1,), None, -1), ...,
    range(3, 0, -1), 1j, complex(math.inf, -0.0), torch.float8_e5m2, torch.bool, torch.strided, torch.channels_last,
    torch.device("cuda", 1), torch.device("cpu"), torch.Size([2, 3]), torch.Size([]),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back(value):
    found = decoded(json.loads(json.dumps(encoded(value), allow_nan=False)))
    assert type(found) is type(value)
    assert repr(found) == repr(value)
    assert found == value


@pytest.mark.parametrize(
    "value", [b"a", bytearray(), {1}, object(), len, int, Point(1, 2), OrderedDict(), torch.ones(1)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_other_values_are_refused(value):
    with pytest.raises(fxzip.SaveError, match="cannot be stored"):
        encoded([value])


def test_values_may_not_lie_too_deep():
    value = []
    for _ in range(100):
        value = [value]
    with pytest.raises(fxzip.SaveError, match="nested"):
        encoded(value)
    with pytest.raises(fxzip.LoadError, match="nested"):
        decoded(value)


def test_tensors_come_back(tmp_path):
    base = torch.randn(4, 6)
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    shared = nn.Parameter(torch.randn(3))
    tensors = [
        shared, nn.Parameter(shared.data), base, base.t(), base[1:3], nn.Parameter(base[:, ::2]), image, image[:, 1],
        torch.tensor(3), torch.tensor(1.5, dtype=torch.float16), torch.randn(2, 3, dtype=torch.complex64),
        torch.randn(2, dtype=torch.complex128).conj(), torch.randn(3).expand(2, 3), torch.empty(0, 3), torch.empty(0),
        torch.randn(5, dtype=torch.bfloat16)[::2], torch.tensor([True, False]), torch.arange(3, dtype=torch.uint8),
        torch.randn(8, 4, 1, 1).to(memory_format=torch.channels_last), nn.Parameter(torch.ones(2), requires_grad=False),
        torch.ones(2).requires_grad_(), torch.randn(3, 2).t(), torch.zeros(2).to(torch.float8_e4m3fn),
        torch.randn(2, 1, 3)[:, :, 1], torch.randn(2, 2, dtype=torch.complex64).t(),
    ]  # fmt: skip
    table = TensorTable()
    for number, tensor in enumerate(tensors):
        assert table.number(tensor, f"t{number}") == number
    data, notes = table.contents()
    save_file(data, tmp_path / "file")
    found = tensors_again(load_file(tmp_path / "file"), json.loads(json.dumps(notes)))
    for own, other in zip(found, tensors, strict=True):
        assert type(own) is type(other)
        assert own.dtype == other.dtype
        assert own.requires_grad == other.requires_grad
        assert own.shape == other.shape
        assert torch.equal(own.float() if own.dtype == torch.float8_e4m3fn else own, other.to(own.dtype).float()
                           if own.dtype == torch.float8_e4m3fn else other)  # fmt: skip
    for number in (6, 18, 21, 24):
        assert found[number].stride() == tensors[number].stride()
    with torch.no_grad():
        found[0].fill_(7)
        found[2].fill_(8)
    assert (found[1] == 7).all()
    assert all((found[number] == 8).all() for number in (2, 3, 4, 5))


# places


def test_a_saved_folder_is_replaced_and_others_are_not(tmp_path, monkeypatch):
    first, x = small(0)
    second, _ = small(1)
    place = tmp_path / "a" / "b" / "zip"
    fxzip.save(first, place)
    fxzip.save(second, str(place))
    assert same(fxzip.load(place), second, x)
    (tmp_path / "empty").mkdir()
    fxzip.save(first, tmp_path / "empty")
    (place / "mine.txt").write_text("mine")
    with pytest.raises(fxzip.SaveError, match=r"holds mine\.txt"):
        fxzip.save(first, place)
    (place / "mine.txt").unlink()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(place)
    for name in ("file", "link"):
        with pytest.raises(fxzip.SaveError, match="something else"):
            fxzip.save(first, tmp_path / name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("mine")
    with pytest.raises(fxzip.SaveError, match="replaces an empty folder or a saved network"):
        fxzip.save(first, tmp_path / "other")

    def fails(*given, **options):
        raise OSError("the disk is full")

    rename = Path.rename

    def fails_in_place(self, target):
        return fails() if Path(target) == place and not self.name.endswith(".before") else rename(self, target)

    for owner, name, wrong in ((serialization, "save_file", fails), (serialization, "_checksum", fails),
                               (Path, "rename", fails_in_place)):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, wrong)
            with pytest.raises(OSError, match="the disk is full"):
                fxzip.save(first, place)
        assert same(fxzip.load(place), second, x)
        assert [path.name for path in place.parent.iterdir()] == ["zip"]


def test_the_card_has_the_form_of_the_hub(tmp_path):
    network, _ = small()
    fxzip.save(network, tmp_path / "zip")
    text = (tmp_path / "zip" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: fxzip\ntags:\n- merge\n- fxzip\n---\n")
    assert f"```text\n{network.report}\n```" in text
    assert 'fxzip.load("path/to/this/folder")' in text


# folders that are not as they were saved


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    network = fxzip.compile_zip({"a": mlp(2), "b": mlp(3)}, x, data=[x], progress=False, until="2", refit="batchnorm")
    place = tmp_path_factory.mktemp("saved") / "zip"
    fxzip.save(network, place)
    return place, network, x


def signed(place):
    """Let the checksums be those of the files, as someone would who wants them believed."""
    manifest = json.loads((place / "fxzip.json").read_text())
    manifest["sha256"] = {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in NAMES[:3]}
    (place / "fxzip.json").write_text(json.dumps(manifest))


def refused_or_same(place, network, x, *, exactly=True):
    """Whether it was refused; else it must be the same network."""
    try:
        found = fxzip.load(place)
    except fxzip.LoadError as error:
        text = str(error)
    else:
        with nullcontext() if exactly else suppress(Exception):  # a setting that was changed may be no setting
            assert same(found, network, x) or not exactly
        return False
    assert any(name in text for name in NAMES)
    return True


def copied(saved, tmp_path):
    place = tmp_path / "zip"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(saved, place)
    return place


def test_bytes_that_are_changed_cut_or_added_are_refused(saved, tmp_path):
    source, network, x = saved
    draw = random.Random(0)
    refused = 0
    for _ in range(160):
        place = copied(source, tmp_path)
        file = place / draw.choice(NAMES[:4])
        held = bytearray(file.read_bytes())
        where = draw.randrange(len(held))
        what = draw.randrange(4)
        if what == 0:
            held[where] ^= 1 << draw.randrange(8)
        elif what == 1:
            del held[where:]
        elif what == 2:
            held[where:where] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
        else:
            del held[where : where + draw.randrange(1, 50)]
        file.write_bytes(held)
        refused += refused_or_same(place, network, x)
    assert refused > 140


def test_files_that_are_missing_swapped_or_links_are_refused(saved, tmp_path):
    source, network, x = saved
    other = tmp_path / "other"
    fxzip.save(small(5)[0], other)
    for name in NAMES[:4]:
        for change in ("missing", "other's", "link", "folder", "empty", "next"):
            place = copied(source, tmp_path)
            (place / name).unlink()
            if change == "other's":
                shutil.copy(other / name, place / name)
            elif change == "link":
                (place / name).symlink_to(source / name)
            elif change == "folder":
                (place / name).mkdir()
            elif change == "empty":
                (place / name).touch()
            elif change == "next":
                shutil.copy(source / NAMES[(NAMES.index(name) + 1) % 4], place / name)
            with pytest.raises(fxzip.LoadError, match="cannot be read") as caught:
                fxzip.load(place)
            assert name in str(caught.value) or change == "other's" or name == "fxzip.json"
    for name in NAMES[:3]:  # the other network's, with its checksum
        place = copied(source, tmp_path)
        shutil.copy(other / name, place / name)
        signed(place)
        assert refused_or_same(place, network, x, exactly=False) or name != "graph.json"
    with pytest.raises(fxzip.LoadError, match="There is no folder"):
        fxzip.load(tmp_path / "nowhere")


def places_in(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places_in(item, (*path, key))


def put(value, path, new):
    if not path:
        return new
    above = value
    for step in path[:-1]:
        above = above[step]
    above[path[-1]] = new
    return value


EVIL = [
    ["os", "system"], ["builtins", "eval"], ["builtins", "exec"], ["torch", "load"], ["posix", "system"],
    ["torch", "os.system"], ["sentinel", "act"], ["subprocess", "Popen"], ["operator", "methodcaller"],
]  # fmt: skip
STRANGE = [
    None, True, -1, 10**30, 1e300, 0.5, "", "..", "../../etc/passwd", "a.__class__", "__init__.__globals__", "a" * 5000,
    "x'); import sentinel; sentinel.act('", [], {}, {"$tuple": 3}, {"$node": "x"}, {"$node": "nobody"}, {"$dtype": "x"},
    {"$size": [-1, "a"]}, {"$tensor": 0}, {"$function": ["os", "system"]}, {"$class": ["os", "system"]}, {"$what": 1},
    {"$dict": [[[], 1]]}, {"$range": [0, 10**40, 1]}, {"$device": "sentinel"}, {"$named": [["builtins", "dict"], []]},
    {"$rebuild": {"class": ["subprocess", "Popen"], "parts": [], "keys": [], "recipe": None}}, {"$part": [0, "a"]},
    {"$dtype": "load"}, *EVIL,
]  # fmt: skip


@pytest.fixture
def sentinel(tmp_path, monkeypatch):
    """A module that a file might name; it says when it is imported or called."""
    (tmp_path / "code").mkdir()
    trace = tmp_path / "executed"
    (tmp_path / "code" / "sentinel.py").write_text(
        f"def act(*given, **options):\n    open({str(trace)!r}, 'a').write('called')\nact()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    for owner, name in ((os, "system"), (subprocess, "Popen"), (torch, "load")):
        monkeypatch.setattr(owner, name, lambda *given, **options: trace.write_text("called"))
    yield trace
    sys.modules.pop("sentinel", None)


@pytest.mark.parametrize("name", ["graph.json", "report.json", "fxzip.json"])
def test_values_that_are_changed_are_refused_and_run_nothing(name, saved, tmp_path, sentinel):
    source, network, x = saved
    draw = random.Random(name)
    original = json.loads((source / name).read_text())
    places = list(places_in(original))
    count, refused = {"graph.json": 350, "report.json": 60, "fxzip.json": 60}[name], 0
    for number in range(count):
        place = copied(source, tmp_path)
        path = draw.choice(places)
        value = json.loads(json.dumps(original))
        held = value
        for step in path:
            held = held[step]
        what = number % 4
        if what == 0 and isinstance(held, dict):
            held["unknown"] = draw.choice(STRANGE)
        elif what == 1 and isinstance(held, (dict, list)) and held:
            del held[draw.choice(list(held) if isinstance(held, dict) else range(len(held)))]
        elif what == 2 and isinstance(held, list) and len(held) > 1:
            draw.shuffle(held)
        else:
            value = put(value, path, draw.choice(STRANGE))
        (place / name).write_text(json.dumps(value))
        if name != "fxzip.json":
            if number % 10 == 0:
                assert refused_or_same(place, network, x)
            signed(place)
        refused += refused_or_same(place, network, x, exactly=False)
    assert not sentinel.exists()
    assert refused > count / 3


@pytest.mark.parametrize("called", EVIL, ids=".".join)
def test_a_call_that_a_file_may_not_name_is_refused(called, saved, tmp_path, sentinel):
    source, _, _ = saved
    for change in ("node", "module", "attribute", "rebuild"):
        place = copied(source, tmp_path)
        value = json.loads((place / "graph.json").read_text())
        if change == "node":
            value["nodes"].insert(1, {"op": "call_function", "name": "own", "target": called, "args": ["touch x"],
                                      "kwargs": {}, "notes": {}})  # fmt: skip
        elif change == "module":
            value["modules"][0]["class"] = called
        elif change == "attribute":
            value["modules"][0]["attributes"]["own"] = {"$function": called}
        else:
            leaf = {"leaf": 0}
            target = {"class": called, "parts": [leaf] * 4, "keys": [],
                      "recipe": {"create": called, "own_attributes": False}}  # fmt: skip
            value["nodes"].insert(1, {"op": "call_function", "name": "own", "target": {"$rebuild": target},
                                      "args": [], "kwargs": {}, "notes": {}})  # fmt: skip
        (place / "graph.json").write_text(json.dumps(value))
        signed(place)
        with pytest.raises(fxzip.LoadError, match=r"`graph.json` cannot be read: (it|a module) .*may not"):
            fxzip.load(place)
    assert not sentinel.exists()


CODE = "a=__import__('sentinel').act(), b"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kwargs", {CODE: 1}, "Names of arguments"), ("name", CODE, "no node"), ("target", "__init__.__globals__", "N"),
        ("target", "trunk.forward", "holds no"), ("target", "trunk.0.bias.grad_fn", "holds no"), ("op", "eval", "no n"),
        ("target", "../trunk", "Names in|holds no"), ("notes", {"part": 3}, "notes"), ("name", "class", "no node"),
    ],
)  # fmt: skip
def test_code_in_names_is_refused(key, value, message, saved, tmp_path, sentinel):
    source, _, _ = saved
    place = copied(source, tmp_path)
    stored = json.loads((place / "graph.json").read_text())
    node = next(node for node in stored["nodes"] if node["op"] == "call_module")
    node[key] = value
    (place / "graph.json").write_text(json.dumps(stored))
    signed(place)
    with pytest.raises(fxzip.LoadError, match=message):
        fxzip.load(place)
    assert not sentinel.exists()


def test_a_later_format_is_refused_and_says_so(saved, tmp_path):
    place = copied(saved[0], tmp_path)
    manifest = json.loads((place / "fxzip.json").read_text())
    (place / "fxzip.json").write_text(json.dumps({**manifest, "format": 2, "more": 1}))
    with pytest.raises(fxzip.LoadError, match="reads saved folders up to format 1; the folder is of format 2"):
        fxzip.load(place)


def test_sizes_are_bounded(saved, tmp_path, monkeypatch):
    place = copied(saved[0], tmp_path)
    with monkeypatch.context() as patched:
        patched.setitem(serialization._LIMITS, "graph.json", 100)
        with pytest.raises(fxzip.LoadError, match=r"`graph.json` cannot be read: it is longer than 100 bytes"):
            fxzip.load(place)
    (place / "graph.json").write_text("[" * 100_000)
    signed(place)
    with pytest.raises(fxzip.LoadError, match=r"`graph.json` cannot be read: it is no JSON"):
        fxzip.load(place)
    for text in ('{"a": 1, "a": 2}', '{"a": NaN}', "1" * 5000, "\xff"):
        (place / "report.json").write_bytes(text.encode("latin1"))
        place2 = copied(saved[0], tmp_path / "more")
        shutil.copy(place / "report.json", place2 / "report.json")
        signed(place2)
        with pytest.raises(fxzip.LoadError, match=r"`report.json` cannot be read"):
            fxzip.load(place2)
    place = copied(saved[0], tmp_path)
    stored = json.loads((place / "graph.json").read_text())
    stored["tensors"][0]["view"] = [[10**9], [0], 0]
    (place / "graph.json").write_text(json.dumps(stored))
    signed(place)
    with pytest.raises(fxzip.LoadError, match=r"a view of .* is larger than the tensor"):
        fxzip.load(place)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    note: str = "x"


class Boxed(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.net = mlp(outputs)

    def forward(self, x):
        return Output(self.net(x))


def test_containers_of_ones_own_are_for_who_names_them(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    network = zipped(Boxed(2).eval(), Boxed(3).eval(), (x,), refit=None)
    fxzip.save(network, tmp_path / "zip")
    with pytest.raises(fxzip.LoadError, match=r"containers of the class 'test_serialization.Output'"):
        fxzip.load(tmp_path / "zip")
    found = fxzip.load(tmp_path / "zip", trust=[Output])
    assert type(found(x)[0]) is Output
    assert torch.equal(found(x)[0].logits, network(x)[0].logits)
