"""Nothing of a compile stays behind in the process, however it ends."""

import random
import warnings
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.fx
from torch import nn

import fxzip
from fxzip.tracing.state import _alone, restored_state

OWNERS = {
    "torch": torch,
    "torch.random": torch.random,
    "torch.compiler": torch.compiler,
    "torch.nn.functional": nn.functional,
    "torch.backends.mha": torch.backends.mha,
    "torch.nn.Module": nn.Module,
    "torch.Tensor": torch.Tensor,
    "torch.fx._Patcher": torch.fx._symbolic_trace._Patcher,
    "warnings": warnings,
}


def snapshot(*models):
    """All that a compile might change in the process, by name."""
    found = {f"{name}.{key}": value for name, owner in OWNERS.items() for key, value in vars(owner).items()}
    for name in ("warnings.filters", "warnings.onceregistry"):
        found.pop(name, None)
    found |= {
        "functorch level": torch._C._functorch.maybe_current_level(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention": tuple(getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in ("flash", "math")),
        "tracing": torch.fx._symbolic_trace.is_fx_tracing(),
        "patcher": torch.fx._symbolic_trace.CURRENT_PATCHER,
        "filters": list(warnings.filters),
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch random": torch.get_rng_state().tolist(),
    }
    if not _alone():  # numbers that other threads may draw stay as they are
        found = {key: value for key, value in found.items() if key not in ("random", "numpy", "torch random")}
    for number, model in enumerate(models):
        found[f"mode {number}"] = [module.training for module in model.modules()]
        found[f"hooks {number}"] = [dict(module._forward_hooks) for module in model.modules()]
        found[f"classes {number}"] = [type(module) for module in model.modules()]
        found[f"values {number}"] = [value.tolist() for value in model.state_dict().values()]
    return found


def unchanged(before, after):
    return [
        key
        for key in before.keys() | after.keys()
        if before.get(key) is not after.get(key) and before.get(key) != after.get(key)
    ]


class Failing(nn.Module):
    """Fails from one of its calls on, copies of it counted in, in the middle of what `around` enters."""

    calls = 0

    def __init__(self, outputs, at, error, around):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, outputs)
        self.at, self.error, self.around = at, error, around

    def forward(self, x):
        Failing.calls += 1
        failing = 0 < self.at <= Failing.calls
        return self.head(self.norm(self.around(self.first, x, self.error if failing else None)))


def plainly(layer, x, error):
    if error:
        raise error
    return layer(x)


def mapped(layer, x, error):
    def one(row):
        if error:
            raise error
        return layer(row)

    return torch.func.vmap(one)(x)


def cast(layer, x, error):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return plainly(layer, x, error).float()


def without_gradient(layer, x, error):
    torch._C._set_grad_enabled(not torch.is_grad_enabled())
    result = plainly(layer, x, error)
    torch._C._set_grad_enabled(not torch.is_grad_enabled())
    return result


def drawing(layer, x, error):
    random.random(), np.random.rand(), torch.manual_seed(3), torch.default_generator.manual_seed(3)
    return plainly(layer, x, error) + 0 * torch.rand(8)


def in_float64(layer, x, error):
    torch.set_default_dtype(torch.float64)
    result = plainly(layer, x, error)
    torch.set_default_dtype(torch.float32)
    return result


def compiled(models, data):
    Failing.calls = 0
    fxzip.compile_zip(*models, torch.ones(2, 4), data=data, progress=False)


@pytest.fixture(scope="module", autouse=True)
def warm():
    """What PyTorch imports when it exports for the first time."""
    compiled([Failing(n, 0, None, mapped).eval() for n in (2, 3)], None)


@pytest.mark.parametrize("around", [plainly, mapped, cast, without_gradient, drawing, in_float64])
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.thinned(2)
def test_a_compile_that_fails_anywhere_leaves_nothing(around, error):
    for at in (
        1,
        3,
        5,
    ):  # when it runs, while it is traced, while it is traced by another rung or the second one is run
        models = [Failing(n, at, error, around).eval() for n in (2, 3)]
        before = snapshot(*models)
        with suppress(fxzip.FxzipError, type(error)):
            compiled(models, [torch.ones(2, 4)])
        assert unchanged(before, snapshot(*models)) == []


@pytest.mark.parametrize("around", [plainly, mapped, drawing])
def test_a_compile_that_succeeds_leaves_nothing(around):
    models = [Failing(n, 0, None, around).eval() for n in (2, 3)]
    before = snapshot(*models)
    compiled(models, [torch.ones(2, 4)])
    assert unchanged(before, snapshot(*models)) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, GeneratorExit])
def test_data_that_end_in_an_exception_leave_nothing(error):
    def batches():
        yield torch.ones(2, 4)
        raise error

    models = [Failing(n, 0, None, plainly).eval() for n in (2, 3)]
    before = snapshot(*models)
    with pytest.raises((error, fxzip.FxzipError)):
        compiled(models, batches())
    assert unchanged(before, snapshot(*models)) == []


def test_a_run_that_stops_half_way_is_taken_back():
    before = snapshot()
    with pytest.raises(KeyboardInterrupt), restored_state():
        half_way()
    assert unchanged(before, snapshot()) == []


def half_way():
    torch._C._functorch._vmap_increment_nesting(3, "error")
    torch.autocast_increment_nesting()
    torch.set_autocast_enabled("cpu", True)
    torch.set_default_dtype(torch.float64)
    torch._C._set_grad_enabled(False)
    torch.overrides.BaseTorchFunctionMode().__enter__()
    torch.default_generator.manual_seed(11)
    raise KeyboardInterrupt


class Ensemble(nn.Module):
    """Members along an axis of the weights, by `vmap`."""

    def __init__(self, outputs):
        super().__init__()
        self.first, self.weights = nn.Linear(4, 6), nn.Parameter(torch.randn(3, 8, 6))
        self.head = nn.Linear(8, outputs)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.head(torch.func.vmap(lambda weight: torch.tanh(h @ weight.mT))(self.weights).mean(0))


class MappedBehindAttention(nn.Module):
    """Attention of `nn.MultiheadAttention` views what its kernel returns; `vmap` is what only export traces."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.func.vmap(torch.tanh)(self.attention(x, x, x, need_weights=False)[0]).mean(1))


def test_a_view_of_what_attention_returns_does_not_depend_on_its_kernel():
    torch.manual_seed(0)
    models, x = [MappedBehindAttention().eval() for _ in range(2)], torch.randn(8, 5, 6)
    zipped = fxzip.compile_zip(models[0], models[0], x, method="permute", refit=None, progress=False)
    torch.testing.assert_close(zipped(x)[1], models[0](x))
    fxzip.compile_zip(*models, x, data=[x], progress=False)


def test_vmap_in_a_model_becomes_plain_calls():
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    for net in (Ensemble, lambda n: Failing(n, 0, None, mapped)):
        a, b = net(2).eval(), net(3).eval()
        zipped = fxzip.compile_zip(a, a, x, data=[x], method="average", refit=None, progress=False)
        for found in zipped(x[:5]):
            torch.testing.assert_close(found, a(x[:5]))
        assert [tuple(y.shape) for y in fxzip.compile_zip(a, b, x, data=[x], progress=False)(x[:4])] == [(4, 2), (4, 3)]
        assert not any("_functorch" in str(node.target) for node in zipped.graph.nodes)


@pytest.mark.parametrize("axes", [(0, 1), (1, 1), (1, -1)])
@pytest.mark.thinned(3)
def test_the_mapped_axis_may_come_back_anywhere(axes):
    class Mapped(MappedBehindAttention):
        def forward(self, x):
            inner = torch.func.vmap(torch.tanh, in_dims=axes[0], out_dims=axes[1])
            attended = self.attention(x, x, x, need_weights=False)[0]
            return self.head(inner(attended).movedim(axes[1], axes[0]).mean(1))

    torch.manual_seed(0)
    model, x = Mapped().eval(), torch.randn(8, 5, 6)
    zipped = fxzip.compile_zip(model, model, x, method="permute", refit=None, progress=False)
    torch.testing.assert_close(zipped(x[:3])[1], model(x[:3]))


class Gradients(nn.Module):
    """What has no counterpart without the transform."""

    def __init__(self, outputs):
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(4, outputs)

    def forward(self, x):
        return self.head(torch.func.vmap(torch.func.grad(lambda row: torch.tanh(self.first(row)).sum()))(x))


def test_a_transform_that_cannot_be_traced_is_a_trace_error():
    before = snapshot()
    with pytest.raises(fxzip.TraceError, match="must be traceable"):
        fxzip.compile_zip(Gradients(2), Gradients(3), torch.ones(4, 4), progress=False)
    after = snapshot()
    before.pop("torch random", None), after.pop("torch random", None)  # the models drew their weights
    assert unchanged(before, after) == []
