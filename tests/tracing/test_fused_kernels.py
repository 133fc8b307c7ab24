"""Fused kernels in parts: they give what the kernels give, and the calls that are seen are those of every device."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from fxzip.tracing import InParts

KINDS = [nn.RNN, nn.GRU, nn.LSTM]
OPTIONS = [
    dict(zip(("num_layers", "bidirectional", "bias", "batch_first"), values, strict=True))
    for values in product((1, 2), (False, True), (False, True), (False, True))
]
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def in_parts(call):
    with torch.no_grad(), Names() as names, InParts():
        return call(), names.seen


def flat(result):
    y, state = result
    return [getattr(y, "data", y), *(state if isinstance(state, tuple) else (state,))]


@pytest.mark.parametrize("options", [*OPTIONS, {"proj_size": 3, "num_layers": 2}])
@pytest.mark.parametrize("batched", [True, False])
def test_lstm_on_a_cpu(options, batched):
    torch.manual_seed(0)
    net, x = nn.LSTM(4, 6, **options), torch.randn(*((3, 5) if batched else (5,)), 4)
    with torch.no_grad(), Names() as plain:
        expected = net(x)
    found, names = in_parts(lambda: net(x))
    torch.testing.assert_close(flat(found)[:1], [expected[0]], **CLOSE)
    torch.testing.assert_close(list(found[1]), list(expected[1]), **CLOSE)
    fused = torch.backends.mkldnn.is_available() and "proj_size" not in options
    assert ("aten::mkldnn_rnn_layer" in plain.seen) == fused
    assert "aten::mkldnn_rnn_layer" not in names
    assert names & {"aten::addmm", "aten::mm"}


def cudnn(net, x, rows=()):
    """The call that `net` makes on a GPU. No kernel is reached: what runs is its parts."""
    mode = 2 if isinstance(net, nn.LSTM) else 3 if isinstance(net, nn.GRU) else 1
    weights = [w for group in net.all_weights for w in group]
    batch = rows[0] if rows else x.shape[0 if net.batch_first else 1]
    layers = net.num_layers * (1 + net.bidirectional)
    state = torch.zeros(layers, batch, net.proj_size or net.hidden_size)
    cell = torch.zeros(layers, batch, net.hidden_size) if mode == 2 else None
    return torch.ops.aten._cudnn_rnn(
        x, weights, len(net.all_weights[0]), None, state, cell, mode, net.hidden_size, net.proj_size, net.num_layers,
        net.batch_first, 0.0, False, net.bidirectional, list(rows), None,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_all_layers_on_a_gpu(kind, options):
    torch.manual_seed(0)
    net, x = kind(4, 6, **options), torch.randn(3, 5, 4)
    with torch.no_grad():
        expected = flat(net(x))
    (found, names) = in_parts(lambda: cudnn(net, x))
    torch.testing.assert_close(list(found[: len(expected)]), expected, **CLOSE)
    assert "aten::_cudnn_rnn" not in names


def test_projections_on_a_gpu():
    torch.manual_seed(0)
    net, x = nn.LSTM(4, 6, 2, proj_size=3), torch.randn(5, 3, 4)
    with torch.no_grad():
        expected = flat(net(x))
    torch.testing.assert_close(list(in_parts(lambda: cudnn(net, x))[0][:3]), expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS[::2])
def test_packed_sequences_on_a_gpu(kind, options):
    torch.manual_seed(0)
    net = kind(4, 6, **options)
    packed = pack_padded_sequence(torch.randn(6, 4, 4), torch.tensor([6, 4, 4, 1]))
    with torch.no_grad():
        expected = flat(net(packed))
    found, _ = in_parts(lambda: cudnn(net, packed.data, packed.batch_sizes.tolist()))
    torch.testing.assert_close(list(found[: len(expected)]), expected, **CLOSE)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell])
def test_cells_on_a_gpu(kind, bias):
    torch.manual_seed(0)
    net, x, h, c = kind(4, 6, bias=bias), torch.randn(3, 4), torch.randn(3, 6), torch.randn(3, 6)
    with torch.no_grad():
        expected = net(x, (h, c)) if kind is nn.LSTMCell else (net(x, h),)
    kernel = torch.ops.aten._thnn_fused_lstm_cell if kind is nn.LSTMCell else torch.ops.aten._thnn_fused_gru_cell
    gates = x @ net.weight_ih.mT, h @ net.weight_hh.mT
    found, _ = in_parts(lambda: kernel(*gates, c if kind is nn.LSTMCell else h, net.bias_ih, net.bias_hh))
    torch.testing.assert_close(list(found[: len(expected)]), list(expected), **CLOSE)


def test_dropout_between_layers_stays_the_kernel_s():
    net, x, state = nn.LSTM(4, 6, 2, dropout=0.5), torch.randn(5, 3, 4), torch.zeros(2, 3, 6)
    weights = [w for group in net.all_weights for w in group]
    with pytest.raises(NotImplementedError, match="_cudnn_rnn"):
        in_parts(lambda: torch.ops.aten._cudnn_rnn(
            x, weights, 4, None, state, state, 2, 6, 0, 2, False, 0.5, True, False, [], None,
        ))  # fmt: skip
