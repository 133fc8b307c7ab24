"""A compile beside other threads: each gets what it gets alone, and nothing is left changed."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxzip
from fxzip.tracing import threads
from fxzip.tracing.fused_kernels import InParts
from fxzip.tracing.randomness import OwnRandomness, own_randomness
from fxzip.tracing.threads import ThreadPatch, without_warnings


class Attending(nn.Module):
    """Traced symbolically with example values: it asks for sizes and makes positions of them."""

    def __init__(self, outputs):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, outputs)

    def forward(self, x):
        h = self.embed(x)
        tokens = h.shape[1]
        return self.head(self.layer(h + torch.arange(tokens).view(1, tokens, 1) * 0.1).mean(1))


class Mapped(nn.Module):
    """Traced by `torch.export` only."""

    def __init__(self, outputs):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, outputs)

    def forward(self, x):
        return self.head(torch.func.vmap(lambda row: torch.relu(self.first(row)) * row.sum())(x))


def mlp(outputs):
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs))


def jobs():
    torch.manual_seed(0)
    tokens, rows = torch.randn(16, 5, 6), torch.randn(16, 6)
    made = [(Attending, tokens), (mlp, rows), (Mapped, rows)]
    return [(net(2).eval(), net(3).eval(), data) for net, data in made]


def compiled(a, b, data):
    return fxzip.compile_zip(a, b, data[:2], data=[data], progress=False)


def outputs(a, b, data):
    zipped = compiled(a, b, data)
    with torch.no_grad():
        return zipped(data)


def same(found, expected):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(found, expected, strict=True))


torch.manual_seed(1)
SERVED = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
TOKENS, HEADS = torch.randn(3, 7, 16), torch.randn(2, 4, 16, 8)


def serve():
    """A forward pass with everything that a compile might change for it: fast path, attention, dtype, weights."""
    with torch.no_grad():
        attended = F.scaled_dot_product_attention(HEADS, HEADS, HEADS, is_causal=True)
        return (
            SERVED(TOKENS),
            attended,
            torch.arange(3) / 2 + torch.zeros(3),
            torch.finfo(torch.get_default_dtype()).eps,
        )


def served(expected):
    *found, eps = serve()
    return same(found, expected[:-1]) and eps == expected[-1]


def test_compiles_beside_each_other_and_beside_a_served_network():
    work, expected = jobs(), serve()
    alone = [outputs(*job) for job in work]
    done, served_well, stop = [None] * len(work), [], threading.Event()

    def compile_again(number):
        try:
            done[number] = same(outputs(*work[number]), alone[number])
        except BaseException as error:
            done[number] = error

    def keep_serving():
        while not stop.is_set():
            try:
                served_well.append(served(expected))
            except BaseException as error:
                served_well.append(error)
            stop.wait(0.01)

    compiling = [threading.Thread(target=compile_again, args=(number,)) for number in range(len(work))]
    serving = threading.Thread(target=keep_serving)
    for thread in (serving, *compiling):
        thread.start()
    for thread in compiling:
        thread.join()
    stop.set()
    serving.join()
    assert done == [True] * len(work)
    assert set(served_well) == {True}


VISITS, VISITORS = [], []


def visit(expected):
    """What another thread sees right now."""
    VISITS.append(served(expected) and torch.backends.mha.get_fastpath_enabled() and not torch.compiler.is_compiling())
    VISITS.append(torch.rand(2))


class Visited(nn.Module):
    """Whenever its forward runs, traced or not, another thread serves a network."""

    def __init__(self, outputs, expected, mapped):
        super().__init__()
        self.first, self.head, self.expected, self.mapped = nn.Linear(6, 8), nn.Linear(8, outputs), expected, mapped

    def forward(self, x):
        VISITORS[0].submit(visit, self.expected).result()
        inner = torch.func.vmap(self.first)(x) if self.mapped else self.first(x)
        return self.head(F.relu(inner) + torch.zeros(x.shape[0], 1))


def test_another_thread_sees_nothing_of_a_trace_in_the_middle_of_it():
    expected = serve()
    VISITORS[:] = [ThreadPoolExecutor(1)]
    VISITORS[0].submit(int).result()  # its thread is there from now on
    for mapped in (False, True):
        VISITS.clear()
        torch.manual_seed(5)
        data = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        outputs(*(Visited(n, expected, mapped).eval() for n in (2, 3)), data)
        seen, drawn = VISITS[::2], torch.cat(VISITS[1::2])
        assert len(seen) > (8 if mapped else 6)
        assert seen == [True] * len(seen)
        torch.manual_seed(5)
        weights = [Visited(n, expected, mapped) for n in (2, 3)]  # draw as the others did
        assert len(weights) == 2
        assert torch.equal(drawn, torch.cat([torch.rand(2) for _ in seen]))
    VISITORS.pop().shutdown()


def test_a_patch_is_for_the_threads_inside_and_goes_with_the_last():
    import math

    original, patch, found = math.floor, ThreadPatch(lambda: [(math, "floor", lambda value: "here")]), []
    with patch.inside(), patch.inside():
        assert math.floor(1.5) == "here"
        other = threading.Thread(target=lambda: found.append(math.floor(1.5)))
        other.start()
        other.join()
    assert found == [1]
    assert math.floor is original


def test_warnings_are_silenced_in_one_thread():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with without_warnings():
            warnings.warn("in here", stacklevel=1)
            other = threading.Thread(target=lambda: warnings.warn("over there", stacklevel=1))
            other.start()
            other.join()
            with warnings.catch_warnings():  # as another thread might, at any time
                pass
        assert [str(warning.message) for warning in seen] == ["over there"]
        assert list(warnings.filters) == before


def draws():
    rrelu = nn.RReLU().train()
    values = [torch.rand(3), torch.randn(4), torch.randint(9, (3,)), torch.randperm(5), torch.empty(2).normal_()]
    values += [torch.rand_like(values[0]), torch.randn_like(values[1]), torch.randint_like(values[0], 7)]
    values += [F.dropout(torch.ones(9)), torch.bernoulli(torch.full((5,), 0.5)), torch.multinomial(torch.ones(4), 2)]
    return [*values, rrelu(-torch.ones(4)), F.dropout2d(torch.ones(1, 4, 2, 2)), torch.normal(0.0, 1.0, (2,))]


def test_own_random_numbers_are_those_of_the_same_seed():
    torch.manual_seed(3)
    expected = draws()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    with own_randomness(3):
        found = draws()
        torch.manual_seed(3)
        again = draws()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            forked = draws()
        assert not torch.equal(torch.rand(3), forked[0])
    assert torch.equal(torch.get_rng_state(), state)
    for other in (found, again, forked):
        assert same(other, expected)


def test_calls_without_a_generator_leave_the_shared_one_as_it_was():
    state = torch.get_rng_state()
    with OwnRandomness(0):
        first = torch.ops.aten.native_dropout(torch.ones(64), 0.5, True)[0]
    with OwnRandomness(0):
        second = torch.ops.aten.native_dropout(torch.ones(64), 0.5, True)[0]
    assert torch.equal(first, second)
    assert 0 < int((first == 0).sum()) < 64
    assert torch.equal(torch.get_rng_state(), state)


def test_fused_attention_is_the_math_backend():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    mask = torch.rand(5, 5) > 0.3
    mask |= torch.eye(5, dtype=torch.bool)
    grouped = (q, k[:, :2], v[:, :2])
    cases = [((q, k, v), {}), ((q, k, v), {"is_causal": True}), ((q, k, v), {"attn_mask": mask}),
             ((q, k, v), {"attn_mask": mask.float(), "scale": 0.2}), (grouped, {"enable_gqa": True})]  # fmt: skip
    for operands, options in cases:
        with torch.no_grad():
            with sdpa_kernel(SDPBackend.MATH):
                expected = F.scaled_dot_product_attention(*operands, **options)
            with InParts():
                found = F.scaled_dot_product_attention(*operands, **options)
        assert torch.equal(found, expected)


TRACERS = {
    "fx": lambda net: fx.symbolic_trace(net),
    "export": lambda net: torch.export.export(net, (torch.randn(3, 6),)).module(),
}


@pytest.mark.parametrize("how", TRACERS)
def test_a_compile_beside_a_thread_that_traces_by_itself(how):
    """Each gets what it gets alone, and PyTorch is not left patched: `nn.Module.__call__` is, while anyone traces."""
    called, looked_up = nn.Module.__call__, nn.Module.__getattr__
    patching = fx._symbolic_trace._Patcher.patch_method
    work = jobs()
    alone = [outputs(*job) for job in work]
    net, x, stop, traced = mlp(3).eval(), torch.randn(3, 6), threading.Event(), []
    expected = net(x)

    def keep_tracing():
        while not stop.is_set():
            try:
                found = TRACERS[how](net)
                traced.append(torch.equal(found(x), expected) and len(list(found.graph.nodes)) > 5)
            except BaseException as error:
                traced.append(error)

    beside = threading.Thread(target=keep_tracing)
    beside.start()
    try:
        zips = [[compiled(*job) for job in work] for _ in range(2)]
    finally:
        stop.set()
        beside.join()
    with torch.no_grad():  # while a thread exports, PyTorch itself runs attention by another kernel in all others
        for again in zips:
            assert all(same(z(job[-1]), found) for z, job, found in zip(again, work, alone, strict=True))
    assert set(traced) == {True}
    assert nn.Module.__call__ is called
    assert nn.Module.__getattr__ is looked_up
    assert fx._symbolic_trace._Patcher.patch_method is patching


def test_a_thread_that_does_not_end_its_trace_is_named(monkeypatch):
    monkeypatch.setattr(threads, "_PATIENCE", 0.05)
    begun, go_on = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x):
            begun.set()
            go_on.wait()
            return x + 1

    beside = threading.Thread(target=fx.symbolic_trace, args=(Waits(),))
    beside.start()
    begun.wait()
    try:
        with pytest.raises(fxzip.TraceError, match=r"No other thread may be in `Tracer\.trace` of PyTorch"):
            outputs(*jobs()[1])
    finally:
        go_on.set()
        beside.join()
    outputs(*jobs()[1])
