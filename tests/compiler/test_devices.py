"""Tensors are made where the models are, in full precision; devices without float64 are worked around."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from models import randomise
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import fxzip
from fxzip.compiler import placement
from fxzip.tracing.precision import full_precision, has_float64

ROOT = Path(fxzip.__file__).parent
FACTORIES = {own.__name__ for own in _device_constructors()} - {"as_tensor", "Generator", "asarray", "from_file"}


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.attend = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        tokens = torch.relu(self.norm(self.stem(x))).flatten(2).transpose(1, 2)
        return self.head(self.attend(tokens).mean(1))


def nets():
    with torch.device("cpu"):
        return randomise(Net(3), 1), randomise(Net(4), 2)


def compiled(**options):
    data = [torch.randn(10, 3, 4, 4, device="cpu", generator=torch.Generator().manual_seed(n)) for n in range(6)]
    options = {"data": data, "progress": False, **options}
    return fxzip.compile_zip(*nets(), torch.ones(2, 3, 4, 4, device="cpu"), **options)


def hidden(tree):
    """Calls of `torch.zeros` and the like that do not say where the tensor is to be."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        if of_torch and node.func.attr in FACTORIES and not any(own.arg in ("device", None) for own in node.keywords):
            yield node


def test_every_tensor_is_made_on_a_device_that_is_named():
    """The caller's default device may be another one than that of the models."""
    assert len(list(hidden(ast.parse("torch.zeros(3); torch.ones(2, device=d); torch.arange(3)")))) == 2
    packages = [path for path in sorted(ROOT.rglob("*.py")) if "tools" not in path.parts]
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}" for path in packages for node in hidden(ast.parse(path.read_text()))
    ]
    assert not found


class Named(TorchFunctionMode):
    """Forbids tensors without a named device, of whatever makes them: what a model makes itself is its own affair."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None and func is not torch.as_tensor:
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            if Path(frame.f_code.co_filename).is_relative_to(ROOT):
                raise AssertionError(f"{frame.f_code.co_filename}:{frame.f_lineno} makes a tensor on no device")
        return func(*args, **kwargs)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("options", [{}, {"refit": "repair", "method": "zip"}, {"width": "auto", "max_cost": 1.2}])
def test_compiles_make_no_tensor_on_the_default_device(options):
    with Named():
        assert len(compiled(**options)(torch.ones(2, 3, 4, 4, device="cpu"))) == 2


def test_the_default_device_does_not_matter():
    expected = compiled()
    torch.set_default_device("meta")
    try:
        found = compiled()
    finally:
        torch.set_default_device(None)
    assert all(map(torch.equal, expected.parameters(), found.parameters()))


def test_no_reduced_precision_meanwhile(monkeypatch):
    """But where the latency is measured, which is that of the caller's settings."""
    monkeypatch.setattr("fxzip.compiler.timing._fastest", lambda networks, *_: [1.0] * len(networks))
    seen = []

    def refit(zipped, plan, data):
        with full_precision():
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return fxzip.LeastSquares()(zipped, plan, data)

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (torch.conv2d, torch.nn.functional.linear, torch.Tensor.matmul):
                seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return func(*args, **(kwargs or {}))

    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    try:
        with Seen():
            compiled(refit=refit)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(seen) > 100
    assert set(seen) == {("highest", False)}


def test_a_device_without_float64_leaves_the_work_to_the_cpu(monkeypatch):
    expected = compiled()
    assert has_float64(torch.device("cpu"))
    monkeypatch.setattr(placement, "has_float64", lambda device: False)
    worked = []
    work = placement.at_work
    monkeypatch.setattr(
        "fxzip.compiler.session.at_work", lambda given: worked.append((given, work(given))) or worked[0][1]
    )
    found = compiled()
    ((given, own),) = worked
    copies = given.networks, own.networks
    assert all(a is not b and next(b.parameters()).device.type == "cpu" for a, b in zip(*copies, strict=True))
    assert all(map(torch.equal, expected.parameters(), found.parameters()))
    assert next(placement.brought_back(found, torch.device("meta")).parameters()).device.type == "meta"


def test_what_cannot_hold_float64(monkeypatch):
    def refuses(*size, dtype, device):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    monkeypatch.setattr(torch, "zeros", refuses)
    assert not has_float64(torch.device("mps"))
