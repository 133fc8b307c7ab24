"""What is loaded from files calls what a file may name, and nothing else."""

import builtins
import importlib
import io
import operator
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fxzip
from fxzip import ops
from fxzip.tracing.allowed import check_name, is_allowed, is_method, named
from fxzip.tracing.stored_graphs import FORMAT

HERE = Path(__file__).parents[1] / "data"


def pair(middle=nn.ReLU):
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 6), middle(), nn.Linear(6, n)).eval() for n in (2, 3)]


def zipped(models=None):
    x = torch.randn(16, 4)
    return fxzip.compile_zip(*(models or pair()), x, data=[x], progress=False)


def file_of(module):
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    return stored


def load(stored):
    """As torch's messages advise: whatever class it asks for is allowed."""
    allowed = []
    for _ in range(60):
        stored.seek(0)
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(stored, weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+) was not|safe_globals\(\[([\w.]+)\]\)", str(error))
            if found is None:
                raise
            module, _, name = (found[1] or found[2]).rpartition(".")
            allowed.append(
                getattr(builtins if module in ("", "__builtin__") else importlib.import_module(module), name)
            )
    raise AssertionError("no end of classes")


@pytest.mark.parametrize("name", ["joint", "mixed", "stems"])
def test_files_of_the_format_before_are_read(name):
    stored = torch.load(HERE / f"zip_format0_{name}.pt", weights_only=False)
    module = stored["module"]
    for found, expected in zip(module(*stored["inputs"]), stored["outputs"], strict=True):
        torch.testing.assert_close(found, expected)
    assert {node.target.__module__ for node in module.graph.nodes if node.op == "call_function"} <= {
        "fxzip.ops",
        "torch.nn.functional",
    }
    again = load(file_of(module))
    assert all(map(torch.equal, again(*stored["inputs"]), module(*stored["inputs"])))


def test_a_file_says_which_format_it_is_of():
    module = zipped()
    kind, *rest = module.__reduce__()
    assert kind is ops.restored
    assert rest[0][-1] == FORMAT
    with pytest.raises(fxzip.LoadError, match=r"reads zipped networks up to format 1; the file is of format 2\."):
        ops.restored(*rest[0][:-1], FORMAT + 1)


def test_a_network_comes_back_with_weights_only():
    module, x = zipped(), torch.randn(5, 4)
    for found, expected in zip(load(file_of(module))(x), module(x), strict=True):
        assert torch.equal(found, expected)


def tampered(called, *args):
    module = zipped()
    graph = module.graph
    with graph.inserting_before(next(node for node in graph.nodes if node.op == "call_module")):
        graph.call_function(called, args)
    return module


def by_name(module, path):
    """A file in which a name stands where a function was."""
    zip_file = zipped()
    kind, (cls, holder, lines, meta, version) = zip_file.__reduce__()
    lines.insert(1, ("call_function", "extra", ops.Function(module, path), ("x",), {}, {}))
    return file_of(_Stored(kind, (cls, holder, lines, meta, version)))


class _Stored:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


HARMFUL = [
    ("os", "system"), ("posix", "system"), ("torch", "os.system"), ("torch", "load"), ("torch", "save"),
    ("torch", "compile"), ("torch", "from_file"), ("torch.hub", "load"), ("torch.utils.cpp_extension", "load"),
    ("torchvision.datasets", "MNIST"), ("torchvision.models", "get_model"), ("builtins", "eval"),
    ("builtins", "exec"), ("builtins", "open"), ("builtins", "__import__"), ("builtins", "setattr"),
    ("operator", "attrgetter"), ("operator", "methodcaller"), ("operator", "call"), ("operator", "__call__"),
    ("torch.ops.aten.from_file", "default"), ("torch.ops.aten.save", "default"), ("torch.ops", "load_library"),
    ("torch.Tensor", "apply_"), ("torch.Tensor", "map_"), ("torch.Tensor", "__reduce_ex__"),
    ("torch.nn.functional", "warnings.warn"), ("fxzip.ops", "importlib.import_module"), ("fxzip.ops", "restored"),
    ("math", "__loader__.load_module"), ("torch", "relu.__class__"), ("torch", "relu; import os"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "path"), HARMFUL)
def test_a_name_that_is_none_of_a_function_on_tensors_is_refused(module, path):
    with pytest.raises(fxzip.LoadError, match=r"^A file may only name functions that act on tensors; this one calls"):
        named(module, path)


@pytest.mark.parametrize(("module", "path"), HARMFUL[:4])
def test_such_a_file_is_refused(module, path):
    with pytest.raises((fxzip.LoadError, pickle.UnpicklingError), match="may only name functions that act on tensors"):
        load(by_name(module, path))


@pytest.mark.parametrize("called", [os.system, os.remove, eval, torch.load, importlib.import_module])
def test_a_harmful_function_is_refused_though_its_class_be_allowed(called, tmp_path):
    with pytest.raises(
        (fxzip.LoadError, pickle.UnpicklingError), match=r"may only name functions that act on tensors|is blocked"
    ):
        load(file_of(tampered(called, f"touch {tmp_path / 'written'}")))
    assert not (tmp_path / "written").exists()


FINE = [
    torch.relu, torch.nn.functional.relu, torch.nn.functional.max_pool2d, torch.nn.functional.gelu, torch.einsum,
    torch.ops.aten.relu.default, torch.ops.aten.sym_size.int, operator.add, operator.getitem, operator.setitem, getattr,
    torch.arange, torch.special.expit, torch.fft.rfft, torch.linalg.vector_norm, torch.cat, torch.sym_max, max,
    torch.nn.functional.multi_head_attention_forward, torch.nn.functional.scaled_dot_product_attention, ops.unmerge,
]  # fmt: skip


@pytest.mark.parametrize("called", FINE, ids=lambda called: getattr(called, "__name__", type(called).__name__))
def test_functions_of_graphs_are_found_by_name(called):
    stored = ops.Function.of(called)
    assert stored.module
    assert stored.find(safely=True) is called


def test_methods_are_those_of_tensors():
    assert all(map(is_method, ["relu", "add_", "view", "size", "softmax", "numel", "unflatten", "clone"]))
    assert not any(
        map(is_method, ["apply_", "map_", "__reduce__", "_make_subclass", "tofile", "set_", "from_file", "mro"])
    )


def with_node(op, target, *args):
    module = zipped()
    kind, (cls, holder, lines, meta, version) = module.__reduce__()
    lines.insert(1, (op, "extra", target, (ops.Reference(lines[0][1]), *args), {}, {}))
    return file_of(_Stored(kind, (cls, holder, lines, meta, version)))


@pytest.mark.parametrize("target", ["apply_", "__reduce_ex__", "tofile"])
def test_other_methods_are_refused(target):
    with pytest.raises((fxzip.LoadError, pickle.UnpicklingError), match="A file may only call methods of tensors"):
        load(with_node("call_method", target))


def test_private_attributes_are_refused():
    with pytest.raises((fxzip.LoadError, pickle.UnpicklingError), match="A file may only read public attributes"):
        load(with_node("call_function", ops.Function("builtins", "getattr"), "__class__"))


CODE = 'a"), __import__("os").system("true"), getattr(self, "a'


@pytest.mark.parametrize("op", ["get_attr", "call_module", "call_method", "placeholder"])
def test_code_in_a_name_is_refused(op):
    with pytest.raises(fxzip.LoadError, match="Names in a graph must be made of letters, digits and underscores"):
        check_name(op, CODE)
    with pytest.raises(fxzip.LoadError, match="Names in a graph"):  # whatever reads the file
        torch.load(with_node(op, CODE), weights_only=False)


@pytest.mark.parametrize("safely", [True, False])
def test_code_in_the_names_of_arguments_is_refused(safely):
    kind, (cls, holder, lines, meta, version) = zipped().__reduce__()
    given = {"inplace=__import__('os').system('true'), a": 1}
    lines.insert(1, ("call_function", "extra", ops.Function("torch", "relu"), (ops.Reference(lines[0][1]),), given, {}))
    stored = file_of(_Stored(kind, (cls, holder, lines, meta, version)))
    with pytest.raises((fxzip.LoadError, pickle.UnpicklingError), match="Names of arguments in a graph must be"):
        load(stored) if safely else torch.load(stored, weights_only=False)


@pytest.mark.parametrize("path", ["__init__.__func__.__globals__", "trunk.__class__"])
def test_names_of_python_are_none_of_modules(path):
    with pytest.raises(fxzip.LoadError, match="Names in a graph"):
        check_name("get_attr", path)


class Doubled(nn.Module):
    def forward(self, x):
        return double(x)


@torch.fx.wrap
def double(x):
    return 2 * x


def test_functions_of_ones_own_are_for_who_names_them():
    module, x = zipped(pair(Doubled)), torch.randn(5, 4)
    assert any(node.target is double for node in module.graph.nodes)
    assert not is_allowed(double)
    for found, expected in zip(torch.load(file_of(module), weights_only=False)(x), module(x), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises((fxzip.LoadError, pickle.UnpicklingError), match=r"`with fxzip.trust\(double\): torch.load"):
        load(file_of(module))
    with fxzip.trust(double):
        again = load(file_of(module))
    assert all(map(torch.equal, again(x), module(x)))
    with pytest.raises((fxzip.LoadError, pickle.UnpicklingError), match="may only name functions"):
        load(file_of(module))


class Autocast(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, outputs)

    def forward(self, x):
        x = self.first(x).relu()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.middle(x)
        return self.last(x.float())


def test_a_graph_inside_a_graph_is_refused_with_a_way_out(tmp_path):
    x = torch.randn(32, 4)
    zipped = fxzip.compile_zip(Autocast(2), Autocast(3), x, data=[x], progress=False)
    with pytest.raises(fxzip.SaveError, match=r"a graph of its own, as calls inside .*torch.save"):
        fxzip.save(zipped, tmp_path / "zipped")
    assert not list(tmp_path.iterdir())
    torch.save(zipped, tmp_path / "zipped.pt")  # what the message says
    again = torch.load(tmp_path / "zipped.pt", weights_only=False)
    assert all(torch.equal(y, z) for y, z in zip(again(x), zipped(x), strict=True))
