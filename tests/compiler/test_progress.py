"""How far a request is: the display, the log, and what Ctrl-C leaves."""

import functools
import io
import itertools
import logging
import threading
import time
from typing import ClassVar

import pytest
import torch
from models import randomise
from models.networks import Residual, torchvision_model
from tqdm import tqdm

import fxzip
from fxzip.compiler import progress
from fxzip.compiler.progress import EACH, ONCE, Display

X = torch.randn(100, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = list(X.split(25))


@pytest.fixture(scope="module")
def pair():
    return [randomise(Residual(n), seed) for seed, n in enumerate((4, 5))]


class Bar:
    """Stands in for tqdm and notes when it was drawn, and as what."""

    drawn: ClassVar[list[tuple[float, str, float]]] = []

    def __init__(self, total, desc, **_):
        self.total, self.desc, self.n = total, desc, 0.0

    def set_description_str(self, text):
        self.desc = text
        self.refresh()

    def update(self, more):
        self.n += more
        self.refresh()

    def refresh(self):
        self.drawn.append((time.monotonic(), self.desc, self.n / self.total))

    def close(self):
        self.refresh()


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(Bar, "drawn", [])
    return Bar.drawn


def displays():
    return [thread for thread in threading.enumerate() if thread.name == "fxzip display"]


def slow(seconds):
    def refit(zipped, plan, data):
        time.sleep(seconds)
        return zipped

    return refit


def test_the_display_is_never_old_and_never_goes_back(pair, drawn):
    fxzip.compile_zip(*pair, X[:4], data=DATA, method="zip", refit=slow(3), progress=True)
    times, texts, shares = zip(*drawn, strict=True)
    asleep = [at for at, text in zip(times, texts, strict=True) if text.startswith("refitting")]
    assert max(b - a for a, b in itertools.pairwise(asleep)) < 2
    assert list(shares) == sorted(shares)
    assert 0.9 < shares[-1] <= 1
    seen = list(dict.fromkeys(text.split(",")[0] for text in texts))
    assert [name for name in seen if name in ONCE | EACH] == [*ONCE, *EACH]
    assert "observing, batch 4 of 4" in texts
    assert not displays()


class Terminal(io.StringIO):
    """Notes when something is written to it."""

    def __init__(self):
        super().__init__()
        self.at = []

    def write(self, text):
        self.at.append(time.monotonic())
        return super().write(text)


@pytest.mark.slow
def test_what_a_terminal_shows_of_a_long_compile_is_never_older_than_two_seconds(monkeypatch):
    """The bar as it is drawn, through every stage, on a network of common size, and images so large that it takes its
    time."""
    models = [torchvision_model("resnet18", seed, num_classes=n) for seed, n in enumerate((10, 5))]
    for size in (64, 128, 256):
        images = torch.randn(128, 3, size, size, generator=torch.Generator().manual_seed(0))
        terminal = Terminal()
        monkeypatch.setattr(progress, "tqdm", functools.partial(tqdm, file=terminal))
        begin = time.monotonic()
        fxzip.compile_zip(*models, images[:4], data=list(images.split(32)), progress=True)
        times = [begin, *terminal.at, time.monotonic()]
        assert max(b - a for a, b in itertools.pairwise(times)) <= 2
        if times[-1] - begin > 20:  # else too short to tell
            break


def test_a_search_shows_the_cut_that_is_tried(pair, drawn):
    fxzip.compile_zip(
        *pair, X[:4], data=DATA, method="zip", refit=None, until="auto", min_agreement=0.01, progress=True
    )
    assert any("matching (cut the full trunk, 1. try)" in text for _, text, _ in drawn)


def test_without_a_display_stages_are_lines_of_the_log(pair, caplog):
    with caplog.at_level(logging.INFO, logger="fxzip"):
        fxzip.compile_zip(*pair, X[:4], data=DATA, method="zip", refit=None, progress=False)
    lines = [record.getMessage() for record in caplog.records if record.name == "fxzip"]
    assert [line.split(":")[0] for line in lines] == [*ONCE, *EACH]
    assert all(line.endswith(" s") for line in lines)


def test_a_display_draws_no_random_numbers(pair, drawn):
    state = torch.get_rng_state()
    fxzip.compile_zip(*pair, X[:4], data=DATA, method="zip", refit=None, progress=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_display_ends_with_an_error(drawn):
    with pytest.raises(ValueError, match="no"), Display(show=True) as display, display.stage("matching"):
        raise ValueError("no")
    assert not displays()


# Ctrl-C ---------------------------------------------------------------------------------------------------------------


class Pressed:
    """A refit during which Ctrl-C is pressed, at the n-th zip."""

    def __init__(self, at):
        self.left = at

    def __call__(self, zipped, plan, data):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return zipped


@pytest.mark.slow
def test_a_search_gives_back_the_best_zip_so_far(pair):
    settings = {
        "data": DATA,
        "method": "zip",
        "until": "auto",
        "width": "auto",
        "max_cost": 1.6,
        "budget": "flops",
        "progress": False,
    }
    text = r"interrupted after 1 zips; 'layer1_1_relu' is the best of them: `error.zipped` holds it"
    with pytest.raises(fxzip.Interrupted, match=text) as e:
        fxzip.compile_zip({"low": pair[0], "high": pair[1]}, X[:4], refit=Pressed(2), **settings)
    auto = e.value.zipped.report["auto"]
    assert auto["interrupted"]
    assert auto["until"] == "layer1_1_relu"
    assert list(e.value.zipped(X[:2])) == ["low", "high"]
    assert isinstance(e.value, KeyboardInterrupt)


def test_with_nothing_done_it_is_a_plain_interrupt(pair):
    with pytest.raises(KeyboardInterrupt) as e:
        fxzip.compile_zip(*pair, X[:4], data=DATA, method="zip", refit=Pressed(1), until="auto", progress=False)
    assert not isinstance(e.value, fxzip.Interrupted)


@pytest.mark.parametrize("tool", ["compare", "sweep"])
def test_a_table_gives_back_its_rows(pair, tool):
    settings = {"method": "zip", "refit": Pressed(2), "cuts": ["layer1", None]}
    if tool == "compare":
        settings = {"methods": [("zip", None), ("permute", Pressed(1))]}
    with pytest.raises(fxzip.Interrupted, match=r"interrupted after 1 of 2 zips: `error\.table` holds") as e:
        getattr(fxzip, tool)(pair, X[:4], data=DATA, progress=False, **settings)
    assert len(e.value.table) == 2  # side by side, and the first
    assert "interrupted after 1 of 2 zips" in str(e.value.table)
