"""A zip is a module like any other: saved, loaded, copied, converted, traced again."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxzip

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    def forward(self, weight):
        return weight * 1.5


def scaled(layer):
    parametrize.register_parametrization(layer, "weight", Scaled())
    return layer


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


def hooked(layer):
    layer.register_forward_hook(lambda module, given, result: result * 1.25)
    layer.register_state_dict_pre_hook(lambda module, prefix, keep_vars: None)
    layer.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.append("made up"))
    return layer


def old(norm):
    def normed(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return norm(layer)

    return normed


NORMS = {
    "plain": lambda layer: layer,
    "weight_norm, old": old(nn.utils.weight_norm),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm, old": old(nn.utils.spectral_norm),
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own parametrisation": scaled,
    "pruned": pruned,
    "hooks": hooked,
}


def mlp(norm, outputs):
    return nn.Sequential(
        norm(nn.Linear(8, 16)), nn.ReLU(), norm(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, outputs)
    ).eval()


class Recurrent(nn.Module):
    def __init__(self, kind, norm, outputs):
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(6, outputs)
        self.layer = norm(kind(8, 6, batch_first=True))

    def forward(self, x):
        return self.head(self.layer(torch.relu(self.first(x)))[0][:, -1])


def check(z, x):
    expected = z(x)

    def same(found):
        assert all(torch.equal(a, b) for a, b in zip(found(x), expected, strict=True))

    stored = io.BytesIO()
    torch.save(z, stored)
    stored.seek(0)
    same(torch.load(stored, weights_only=False))
    same(pickle.loads(pickle.dumps(z)))
    same(copy.deepcopy(z))
    other = copy.deepcopy(z)
    for value in other.parameters():
        value.data.zero_()
    assert other.load_state_dict(z.state_dict()) == other.load_state_dict(z.state_dict(), assign=True)
    same(other)
    stored = io.BytesIO()
    torch.save(z.state_dict(), stored)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)
    assert list(state) == list(z.state_dict())
    single = z.single(1)
    assert torch.equal(pickle.loads(pickle.dumps(single))(x), expected[1])
    double = copy.deepcopy(z).double()(x.double())
    assert all(value.dtype == torch.float64 for value in double)
    for found, value in zip(double, expected, strict=True):
        torch.testing.assert_close(found.float(), value, rtol=1e-4, atol=1e-5)
    assert all(value.dtype == torch.bfloat16 for value in copy.deepcopy(z).to(torch.bfloat16)(x.bfloat16()))
    same(copy.deepcopy(z).share_memory())


@pytest.mark.thinned(3)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_zip_of_normed_layers_is_saved_and_copied(norm):
    torch.manual_seed(0)
    z = fxzip.compile_zip(mlp(norm, 3), mlp(norm, 4), X, data=[X], progress=False)
    assert not any(module._forward_hooks or module._load_state_dict_pre_hooks for module in z.modules())
    check(z, X)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("norm", [NORMS["plain"], lambda layer: parametrizations.weight_norm(layer, "weight_hh_l0")])
def test_a_zip_of_recurrent_layers_is_saved_and_copied(kind, norm):
    torch.manual_seed(0)
    x = torch.randn(8, 5, 8)
    a, b = (Recurrent(kind, norm, n).eval() for n in (2, 3))
    z = fxzip.compile_zip(a, b, x, data=[x], progress=False)
    check(z, x)
    torch.testing.assert_close(fxzip.compile_zip(a, a, x, data=[x], refit=None, progress=False)(x)[0], a(x))


def test_a_zip_is_exported_and_compiled():
    torch.manual_seed(0)
    z = fxzip.compile_zip(mlp(NORMS["weight_norm"], 3), mlp(NORMS["weight_norm"], 4), X, data=[X], progress=False)
    exported = torch.export.export(z, (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    for found, expected in zip(exported(X[:5]), z(X[:5]), strict=True):
        torch.testing.assert_close(found, expected)


class Layouts(nn.Module):
    """Memory formats, a buffer that is read by computed numbers, and sequences of several lengths."""

    def __init__(self, classes):
        super().__init__()
        self.first, self.rest, self.head = nn.Linear(8, 12), nn.GRU(12, 10, batch_first=True), nn.Linear(10, classes)
        self.register_buffer("table", torch.randn(classes))

    def forward(self, x):
        h = torch.relu(self.first(x)).contiguous(memory_format=torch.contiguous_format)[:, None]
        packed = nn.utils.rnn.pack_padded_sequence(h, torch.ones(x.shape[0], dtype=torch.int64), batch_first=True)
        logits = self.head(self.rest(packed)[1][0])
        return logits, self.table[logits.argmax(1)]


def test_what_protocol_2_and_plain_data_cannot_hold_by_themselves(tmp_path):
    zipped = fxzip.compile_zip(Layouts(3), Layouts(4), X, data=[X], progress=False)
    expected = zipped(X)
    file = io.BytesIO()
    torch.save(zipped, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(X), expected, rtol=0, atol=0)
    zipped.save_pretrained(tmp_path / "zip")
    loaded = fxzip.load(tmp_path / "zip", trust=[nn.utils.rnn.PackedSequence])
    torch.testing.assert_close(loaded(X), expected, rtol=0, atol=0)
