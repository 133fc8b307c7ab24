"""FLOPs: what torch counts is counted alike; what it does not know is counted here, or named."""

import pytest
import torch
from models.networks import Residual
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fxzip
from fxzip.analysis.flops import count_flops
from fxzip.tracing.calls import as_call


class Wrapped(nn.Module):
    """A function as a module, so that it is one node."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *values):
        return self.function(*values)


def counted(model, *inputs):
    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return True

    holder = nn.Module()
    holder.inner = model
    graph = torch.fx.Graph()
    values = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    graph.output(graph.call_module("inner", tuple(values)))
    return count_flops(torch.fx.GraphModule(holder, graph), as_call(inputs))


def test_what_torch_counts_is_counted_alike():
    net, x = Residual(4).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    found = count_flops(fxzip.tracing.trace(net, x).module, as_call(x))
    assert found.total == counter.get_total_flops() > 0
    assert not found.unknown


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("options", "widths"), [
    ({}, [(8, 6)]), ({"num_layers": 2}, [(8, 6), (6, 6)]), ({"bidirectional": True}, [(8, 6), (8, 6)]),
])  # fmt: skip
def test_recurrent_layers_are_their_matrix_products(kind, gates, dtype, options, widths):
    net = kind(8, 6, batch_first=True, **options).to(dtype).eval()
    found = counted(net, torch.randn(3, 5, 8, dtype=dtype))
    assert found.total == 2 * 15 * sum(gates * 6 * (read + 6) for read, _ in widths)
    assert not found.unknown


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNNCell, 1), (nn.GRUCell, 3), (nn.LSTMCell, 4)])
def test_cells_too(kind, gates):
    assert counted(kind(8, 6), torch.randn(3, 8)).total == 2 * 3 * gates * 6 * 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_has_scores_and_values_whatever_the_kernel(dtype):
    q, k, v = (torch.randn(2, 4, n, 8, dtype=dtype) for n in (5, 7, 7))
    expected = 2 * 2 * 4 * 5 * 7 * 16
    assert counted(Wrapped(F.scaled_dot_product_attention), q, k, v).total == expected
    mask = torch.zeros(5, 7, dtype=dtype)
    assert (
        counted(Wrapped(lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=mask)), q, k, v).total == expected
    )


def test_products_that_torch_does_not_count():
    a, b, v = torch.randn(4, 6), torch.randn(6, 3), torch.randn(6)
    assert counted(Wrapped(torch.mv), a, v).total == 48
    assert counted(Wrapped(torch.dot), v, v).total == 12
    assert counted(Wrapped(torch.addmv), torch.randn(4), a, v).total == 48
    sparse = torch.eye(6)[:4].to_sparse()
    assert counted(Wrapped(lambda x: torch.sparse.mm(sparse, x)), b).total == 2 * 4 * 3
    assert counted(Wrapped(lambda x: sparse @ x), b).total == 2 * 4 * 3
    assert counted(nn.Bilinear(3, 4, 5), torch.randn(2, 3), torch.randn(2, 4)).total == 2 * 2 * 5 * 3 * 4
    x = torch.randn(8, 16)
    assert counted(Wrapped(torch.fft.fft), x.to(torch.complex64)).total == 5 * 128 * 4
    assert counted(Wrapped(torch.fft.rfft), x).total == 5 * 128 * 4 // 2


@pytest.mark.parametrize("function", [
    torch.relu, lambda x: x.softmax(1), lambda x: F.layer_norm(x, (6,)), lambda x: x.cumsum(1), lambda x: x.sort(1)[0],
    lambda x: x.chunk(2, 1)[0].clone(), lambda x: torch.zeros(4, 6).index_add(0, torch.arange(4), x),
    lambda x: F.embedding_bag(torch.tensor([[0, 1]]), x), lambda x: x.masked_scatter(x > 0, x), lambda x: x.std(1),
    lambda x: F.rms_norm(x, (6,)), lambda x: F.interpolate(x[None], scale_factor=2), lambda x: x.scatter_reduce(
        0, torch.zeros(4, 6, dtype=torch.int64), x, "amax"), lambda x: x.kthvalue(2, 1)[0], lambda x: x.unique(),
])  # fmt: skip
def test_what_costs_little_counts_as_none(function):
    found = counted(Wrapped(function), torch.randn(4, 6))
    assert found.total == 0
    assert not found.unknown


@torch.library.custom_op("fxzip_tests::scan", mutates_args=())
def scan(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


@scan.register_fake
def _(x, weight):
    return x @ weight


class Scanning(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.i, self.w, self.h = nn.Linear(6, 8), nn.Parameter(torch.randn(8, 8)), nn.Linear(8, classes)

    def forward(self, x):
        return self.h(scan(torch.relu(self.i(x)), self.w))


def test_what_is_not_known_is_named():
    found = counted(Wrapped(lambda x: torch.linalg.inv(x)), torch.randn(4, 4))
    assert found.unknown == {"inner": ("linalg_inv_ex",)}
    x = torch.randn(40, 6)
    zipped = fxzip.compile_zip(Scanning(2), Scanning(3), x, data=[x], progress=False)
    assert {name.split(" ")[0] for name in zipped.report["flops"]["unknown"]} == {"`fxzip_tests::scan`"}
    (note,) = [note for note in zipped.report["notes"] if "FLOPs of" in note]
    assert "are not known and count as none: shares of FLOPs (`until` as a fraction, `max_cost`, `width`)" in note
    assert note in str(zipped.report)


def test_a_recurrent_trunk_is_no_free_one():
    class Net(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.i, self.r, self.h = nn.Linear(8, 16), nn.LSTM(16, 32, batch_first=True), nn.Linear(32, classes)

        def forward(self, x):
            return self.h(self.r(torch.relu(self.i(x)))[0][:, -1])

    x = torch.randn(20, 6, 8)
    flops = fxzip.compile_zip(Net(3), Net(4), x[:4], data=[x], progress=False).report["flops"]
    products = 2 * 4 * 6 * (8 * 16 + 4 * 32 * 48)
    assert flops["originals"] == [products + 2 * 4 * 32 * n for n in (3, 4)]
    assert flops["total"] == flops["trunk"] + sum(flops["heads"])
    assert flops["total"] >= max(flops["originals"])


def test_calls_that_only_lay_out_or_compare_values_count_as_none():
    class Laid(torch.nn.Module):
        def forward(self, x):
            z = torch.polar(x, x) * torch.complex(x, x)
            return torch.block_diag(z.real, x) * torch.dist(x, x) + torch.diag_embed(x[0]).sum()

    counted = count_flops(torch.fx.symbolic_trace(Laid()), as_call(torch.randn(3, 4)))
    assert counted.total == 0
    assert not counted.unknown
