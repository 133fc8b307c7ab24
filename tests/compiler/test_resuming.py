"""A compile that was killed goes on where it was, and ends with the network of one that was not, to the bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import randomise
from torch import nn

import fxzip
from fxzip.compiler import resuming, search
from fxzip.compiler.resuming import FolderStore
from fxzip.refit.least_squares import walk


class Net(nn.Module):
    """Convolutions with a shortcut, a normalisation and a linear head."""

    def __init__(self, classes, width=6, blocks=1):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.body = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        for conv in self.body:
            x = torch.relu(x + conv(x))
        return self.head(x.mean((2, 3)))


def nets(**sizes):
    return randomise(Net(3, **sizes), 1), randomise(Net(4, **sizes), 2)


def mlp(classes, seed):
    layers = [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, classes)]
    return randomise(nn.Sequential(*layers), seed)


def data(count=4, rows=16, seed=3, shape=(6,)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, *shape, generator=generator) for _ in range(count)]


def images(count=4, rows=16, size=8):
    return data(count, rows, shape=(3, size, size))


def compiled(resume=None, *, models=None, batches=None, **options):
    quick = {"refit": fxzip.LeastSquares(least=300, positions=3), "progress": False, "verify": False}
    batches = data() if batches is None else batches
    sample = torch.ones(2, *images()[0].shape[1:] if isinstance(models, tuple) else (6,))
    models = models or [mlp(3, 1), mlp(4, 2)]
    return fxzip.compile_zip(list(models), sample, data=batches, resume=resume, **quick | options)


def same(found, expected):
    assert found.code == expected.code
    for (name, value), own in zip(expected.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(value, own), name
    for key in ("agreement", "auto", "spaces"):
        assert found.report.as_dict().get(key) == expected.report.as_dict().get(key), key


class Killed(BaseException):
    """What no code catches."""


@pytest.fixture
def kill(monkeypatch):
    """Lets a compile make so many values, and no more."""
    left, made, write = [1 << 30], [], resuming._write

    def counted(place, name, value):
        if not left[0]:
            raise Killed
        left[0] -= 1
        write(place, name, value)
        made.append(name)

    monkeypatch.setattr(resuming, "_write", counted)

    def run(after, *given, **options):
        left[0] = after
        made.clear()
        try:
            return compiled(*given, **options), tuple(made)
        except Killed:
            return None, tuple(made)

    return run


WAYS = {
    "default": {}, "cut": {"until": "auto", "min_agreement": 0.3},
}  # fmt: skip
SLOW = {
    "by need": {"width": "auto", "budget": "flops", "max_cost": 0.9},
    "convolutions": {"models": nets(), "batches": images()}, "repaired": {"refit": "repair"},
    "ranks": {"rank": 0.6, "models": nets(), "batches": images()},
    "several sources": {"batches": fxzip.PerModel(data(3), data(3, seed=4)), "method": "permute"},
    "best cut": {"until": "auto", "max_cost": 0.9, "width": "auto", "budget": "flops"},
}  # fmt: skip


@pytest.mark.parametrize("way", [*WAYS, *(pytest.param(way, marks=pytest.mark.slow) for way in SLOW)])
def test_interrupted_after_every_value(way, kill, tmp_path):
    options = {**WAYS, **SLOW}[way]
    step = {"default": 2, "cut": 4, "best cut": 4}.get(way, 1)
    expected, made = compiled(**options), list[str]()
    while True:
        found, own = kill(step, tmp_path, **options)
        assert found is not None or len(own) == step
        made += own
        if found is not None:
            break
    same(found, expected)
    assert any("moments" in name for name in made)
    assert len(made) == len(list(tmp_path.glob("*.safetensors")))
    assert (sum("head" in name for name in made) >= 2) == (way != "repaired")
    whole, again = kill(0, tmp_path, **options)
    same(whole, expected)
    assert not again


def test_what_is_there_is_not_computed_again(monkeypatch, tmp_path):
    """Neither a pass that observes, nor a regression; of the cuts that were tried only the one that is chosen."""
    options = {"until": "auto", "min_agreement": 0.3}
    expected = compiled(tmp_path, **options)

    def never(*given, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr("fxzip.compiler.session.observe_all", never)
    monkeypatch.setattr(walk, "solve", never)
    monkeypatch.setattr(search, "mean_closeness", never)
    built, made = [], search.Trials._made
    monkeypatch.setattr(search.Trials, "_made", lambda self, place: built.append(place) or made(self, place))
    same(compiled(tmp_path, **options), expected)
    assert len(built) == 1


def test_another_bound_on_memory_may_be_asked_for(kill, tmp_path):
    assert kill(3, tmp_path, refit="lstsq")[0] is None
    found, made = kill(99, tmp_path, refit=fxzip.LeastSquares(memory=1 << 20))
    assert found is not None
    assert len(made) == 2


OTHERS = {
    r"`method` was .* and is Zip\(": {"method": "zip"},
    r"`until` was FixedCut\(until=None\) and is FixedCut\(until='2'\)": {"until": "2"},
    r"`refit` was LeastSquares\(ridge=0.0001": {"refit": fxzip.LeastSquares(ridge=1e-3, least=300, positions=3)},
    r"`hold_out` was True and is False": {"hold_out": False},
    r"model 0 was [0-9a-f]{57}\.\.\. and is": {"models": [mlp(3, 5), mlp(4, 2)]},
    r"data was [0-9a-f]{57}\.\.\. and is": {"batches": data(seed=4)},
    r"data was": {"batches": data()[::-1]},
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    return folder, compiled(folder)


@pytest.mark.parametrize("message", OTHERS)
def test_another_request_is_refused(message, begun):
    folder, _ = begun
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(fxzip.OptionError, match=f"was begun for another: {message}"):
        compiled(folder, **OTHERS[message])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


class Changed(nn.Sequential):
    """Its code may be another one tomorrow."""

    last = staticmethod(torch.relu)

    def forward(self, x):
        return self.last(super().forward(x))


def test_another_graph_is_refused(monkeypatch, tmp_path):
    models = [Changed(*mlp(3, 1)), Changed(*mlp(4, 2))]
    compiled(tmp_path, models=models)
    monkeypatch.setattr(Changed, "last", staticmethod(torch.tanh))
    with pytest.raises(fxzip.OptionError, match="graph of model 0 was"):
        compiled(tmp_path, models=models)


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(fxzip.OptionError, match=r"a folder of its own.*holds something else, `letter.txt`"):
        compiled(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    with pytest.raises(fxzip.OptionError, match="a folder that can be written to"):
        compiled(tmp_path / "letter.txt")
    other = tmp_path / "other"
    other.mkdir()
    (other / "request.json").write_text("[]")
    with pytest.raises(fxzip.OptionError, match="cannot be read"):
        compiled(other)
    (other / "request.json").write_text('{"format": 99, "request": {}}')
    with pytest.raises(fxzip.OptionError, match="is of format 99"):
        compiled(other)


def test_damaged_files_are_made_anew(begun, tmp_path):
    folder, expected = begun
    for number, path in enumerate(sorted(folder.iterdir())):
        content = bytearray(path.read_bytes())
        if path.suffix == ".safetensors" and number % 3 == 0:
            content[-1] ^= 1
        elif path.suffix == ".safetensors":
            content = [b"", content[: len(content) // 2]][number % 3 - 1]
        (tmp_path / path.name).write_bytes(content)
    (tmp_path / ".unfinished-1").write_bytes(b"half")
    same(compiled(tmp_path), expected)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert not list(tmp_path.glob(".unfinished*"))
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}


def test_values_come_back_as_they_were(tmp_path):
    tensors = [torch.randn(3, 4).T, torch.tensor(2.5), torch.zeros(0, 3), torch.tensor([True, False]), torch.arange(3)]
    value = ({1: tensors[0], "a": [None, float("inf"), 1e-30]}, tuple(tensors), "text")
    for _ in range(2):
        found = FolderStore(tmp_path).value("a/b: ", lambda: value)
        assert found[0]["a"] == value[0]["a"]
        assert found[2] == "text"
        for own, given in zip((found[0][1], *found[1]), (tensors[0], *tensors), strict=True):
            assert torch.equal(own, given)
            assert own.dtype == given.dtype


def test_parts_find_their_values_again(tmp_path):
    store = FolderStore(tmp_path)

    def numbered(start):
        for part in ("first", "second"):
            with store.part(part):
                yield [store.value("x", lambda own=k: start + own) for k in range(2)]
        yield store.value("x", lambda: start)

    assert list(numbered(10)) == [[10, 11], [10, 11], 10]
    store = FolderStore(tmp_path)
    assert list(numbered(20)) == [[10, 11], [10, 11], 10]
    assert store.value("x", lambda: 30) == 30


CHILD = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
from test_resuming import compiled, images, nets
print("ready", flush=True)
zipped = compiled(sys.argv[1], models=nets(width=24, blocks=4), batches=images(12, 32, 12),
                  refit="lstsq", until="auto", min_agreement=0.5)
torch.save({{"weights": zipped.state_dict(), "code": zipped.code}}, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.hours
def test_killed_at_random_moments(tmp_path):
    """Twenty times, by the system. Each folder is gone on with until its compile comes to the end."""
    draw = random.Random(0)

    def run(folder, seconds=None):
        """Whether it came to the end; how long it took."""
        process = subprocess.Popen([sys.executable, "-c", CHILD, folder, tmp_path / "out.pt"], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        start = time.monotonic()
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            code = process.wait()
        process.stdout.close()
        assert code in (0, -signal.SIGKILL)
        return code == 0, time.monotonic() - start

    done, whole = run(tmp_path / "whole")
    assert done
    expected = torch.load(tmp_path / "out.pt")
    kills = finished = 0
    while kills < 20 or not finished:
        done, _ = run(tmp_path / f"killed {finished}", draw.uniform(0, whole) if kills < 20 else None)
        kills += not done
        if done:
            found = torch.load(tmp_path / "out.pt")
            assert found["code"] == expected["code"]
            assert all(torch.equal(value, found["weights"][name]) for name, value in expected["weights"].items())
            finished += 1
