"""Zipped networks as files for other programs."""

import pytest
import torch
from models import randomise
from models.networks import Residual
from torch import nn

import fxzip
from fxzip.tools import exporting

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def zipped(named=True, **options):
    models = [randomise(Residual(classes), seed) for seed, classes in enumerate((4, 5))]
    given = dict(zip(("cats", "dogs"), models, strict=True)) if named else models
    return fxzip.compile_zip(given, X, data=[X], progress=False, **options)


def outputs(network, x):
    with torch.no_grad():
        found = network(x)
    return list(found.values()) if isinstance(found, dict) else [found] if torch.is_tensor(found) else list(found)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("options", [{}, {"until": "layer1"}, {"width": 1.5}])
def test_a_program_of_torch_export(tmp_path, options):
    network = zipped(**options).train()
    path = fxzip.export(network, tmp_path / "zip.pt2")
    assert network.training
    assert [file.name for file in tmp_path.iterdir()] == ["zip.pt2"]
    x = torch.randn(5, 3, 8, 8)
    loaded = torch.export.load(path).module()
    for found, expected in zip(outputs(loaded, x), outputs(network.eval(), x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.thinned(2)
def test_onnx(tmp_path, named):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = zipped(named)
    path = fxzip.export(network, tmp_path / "zip.onnx")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [out.name for out in session.get_outputs()] == (["cats", "dogs"] if named else ["head_0", "head_1"])
    for rows in (1, 6):
        x = torch.randn(rows, 3, 8, 8)
        for found, expected in zip(session.run(None, {"x": x.numpy()}), outputs(network, x), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_one_task_alone(tmp_path):
    network = zipped()
    alone = network.single("dogs")
    path = fxzip.export(alone, tmp_path / "dogs.pt2", X)
    (found,) = outputs(torch.export.load(path).module(), X)
    torch.testing.assert_close(found, outputs(network, X)[1])
    made_up = torch.export.load(fxzip.export(alone, tmp_path / "dogs.pt2")).module()
    torch.testing.assert_close(outputs(made_up, X)[0], outputs(network, X)[1])
    alone.meta.clear()
    with pytest.raises(fxzip.InputError, match="must be one batch of what the network takes"):
        fxzip.export(alone, tmp_path / "dogs.pt2")


def test_several_tensors_of_a_head():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.relu(self.body(x))
            return {"features": h, "logits": self.head(h)}

    network = fxzip.side_by_side([Two(), Two()], torch.ones(2, 4))
    assert exporting.output_names(network) == ["head_0_0", "head_0_1", "head_1_0", "head_1_1"]


def test_a_file_that_is_wrong_is_not_handed_over(tmp_path, monkeypatch):
    network = zipped()
    plain = torch.export.load

    class Wrong:
        def __init__(self, program):
            self.program = program

        def module(self):
            inner = self.program.module()
            return lambda x: [y + 1 for y in outputs(inner, x)]

    monkeypatch.setattr(torch.export, "load", lambda path: Wrong(plain(path)))
    with pytest.raises(fxzip.FxzipError, match=r"in torch\.export, on a batch of 1, the output differs"):
        fxzip.export(network, tmp_path / "zip.pt2")
    assert not list(tmp_path.iterdir())


def test_other_suffixes(tmp_path):
    with pytest.raises(fxzip.OptionError, match=r"must end in \.onnx or \.pt2"):
        fxzip.export(zipped(), tmp_path / "zip.pth")
