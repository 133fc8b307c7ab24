"""Graph convolutions written by hand in message-passing style: index, weigh, scatter."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.analysis import relative_difference

EDGES = torch.randint(0, 20, (2, 70), generator=torch.Generator().manual_seed(0))


class GCN(nn.Module):
    """Kipf & Welling 2017: sums over neighbours, normalised by degrees."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear, self.bias = nn.Linear(inputs, outputs, bias=False), nn.Parameter(torch.randn(outputs))

    def forward(self, x, edges):
        x = self.linear(x)
        source, target = edges[0], edges[1]
        degree = torch.zeros(x.shape[0], dtype=x.dtype).scatter_add(0, target, torch.ones_like(target, dtype=x.dtype))
        scale = degree.pow(-0.5)
        scale = scale.masked_fill(scale == float("inf"), 0.0)
        message = (scale[source] * scale[target]).view(-1, 1) * x.index_select(0, source)
        out = x.new_zeros(x.shape[0], message.shape[1])
        return out.scatter_add_(0, target.view(-1, 1).expand_as(message), message) + self.bias


class SAGE(nn.Module):
    """Hamilton et al. 2017: mean or maximum over neighbours."""

    def __init__(self, inputs, outputs, reduce):
        super().__init__()
        self.near, self.own, self.reduce = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, False), reduce

    def forward(self, x, edges):
        message = x[edges[0]]
        if self.reduce == "max":
            index = edges[1].unsqueeze(-1).repeat(1, x.shape[-1])
            out = x.new_zeros(x.shape).scatter_reduce(0, index, message, "amax", include_self=False)
        else:
            ones = torch.ones(edges.shape[1], dtype=x.dtype)
            count = torch.zeros(x.shape[0], dtype=x.dtype).index_add_(0, edges[1], ones)
            out = torch.zeros_like(x).index_add_(0, edges[1], message) / count.clamp(min=1)[:, None]
        return F.normalize(self.near(out) + self.own(x), p=2.0, dim=-1)


class GIN(nn.Module):
    """Xu et al. 2019: sums over neighbours, then a small network."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.eps = nn.Parameter(torch.tensor([0.1]))
        self.layers = nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())

    def forward(self, x, edges):
        near = torch.zeros(x.shape, dtype=x.dtype).index_add(0, edges[1], x.index_select(0, edges[0]))
        return self.layers((1 + self.eps) * x + near)


class GAT(nn.Module):
    """Veličković et al. 2018: attention over neighbours, by a softmax over the edges of each node."""

    def __init__(self, inputs, heads, width):
        super().__init__()
        self.heads, self.width = heads, width
        self.linear, self.bias = nn.Linear(inputs, heads * width, bias=False), nn.Parameter(torch.randn(heads * width))
        self.source, self.target = (nn.Parameter(torch.randn(1, heads, width)) for _ in range(2))

    def forward(self, x, edges):
        x = self.linear(x).view(-1, self.heads, self.width)
        source, target = edges[0], edges[1]
        score = F.leaky_relu((x * self.source).sum(-1)[source] + (x * self.target).sum(-1)[target], 0.2)
        index = target.view(-1, 1).expand_as(score)
        nothing = score.new_zeros(x.shape[0], self.heads)
        score = (score - nothing.scatter_reduce(0, index, score, "amax", include_self=False)[target]).exp()
        score = score / (nothing.scatter_add(0, index, score) + 1e-16).index_select(0, target)
        out = torch.zeros(x.shape[0], self.heads, self.width, dtype=x.dtype)
        return out.index_add(0, target, x[source] * score.unsqueeze(-1)).view(-1, self.heads * self.width) + self.bias


class Net(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second, self.head = first, second, nn.Linear(8, 3)

    def forward(self, x, edges):
        return self.head(F.relu(self.second(F.relu(self.first(x, edges)), edges)))


CONVOLUTIONS = {
    "GCN": lambda inputs: GCN(inputs, 8),
    "SAGE, mean": lambda inputs: SAGE(inputs, 8, "mean"),
    "SAGE, max": lambda inputs: SAGE(inputs, 8, "max"),
    "GIN": lambda inputs: GIN(inputs, 8),
    "GAT": lambda inputs: GAT(inputs, 2, 4),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_graph_convolutions_share_all_their_features(name):
    build = CONVOLUTIONS[name]
    torch.manual_seed(0)
    net = Net(build(6), build(8)).double().eval()
    x = torch.randn(20, 6, dtype=torch.float64)
    if name != "GAT":  # whose features are those of heads
        assert [(s.size, s.legality) for s in fxzip.inspect(net, (x, EDGES)).spaces] == [(8, "free")] * 2
    twin = fxzip.relabel(net, (x, EDGES), seed=1)
    zipped = fxzip.compile_zip(net, twin, (x, EDGES), data=[(x, EDGES)], method="permute", refit=None, progress=False)
    assert zipped.report["cut"]["after"] == ["relu_1"]
    with torch.no_grad():
        assert max(relative_difference(net(x, EDGES), output) for output in zipped(x, EDGES)) < 1e-12


class Sparse(nn.Module):
    """Sums over neighbours as products with a sparse matrix, that of a buffer or of the edges that are given."""

    def __init__(self, classes, edges=None):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, classes)
        if edges is not None:
            self.register_buffer("near", torch.sparse_coo_tensor(edges, torch.ones(70), (20, 20)).coalesce())

    def forward(self, x, edges):
        near = torch.sparse_coo_tensor(edges, torch.ones_like(edges[0], dtype=x.dtype), (x.shape[0], x.shape[0]))
        near = self.near if hasattr(self, "near") else near
        return self.head(torch.relu(near @ self.second(torch.relu(torch.sparse.mm(near, self.first(x))))))


@pytest.mark.parametrize("held", [False, True])
def test_sparse_matrices_inside_a_network(held, tmp_path):
    torch.manual_seed(0)
    a, b = (Sparse(n, EDGES if held else None).eval() for n in (3, 4))
    x = torch.randn(20, 8)
    zipped = fxzip.compile_zip(a, b, (x, EDGES), data=[(x, EDGES)], method="zip", refit=None, width=2, progress=False)
    for model, output in zip((a, b), zipped(x, EDGES), strict=True):
        torch.testing.assert_close(output, model(x, EDGES), rtol=1e-4, atol=1e-4)
    if held:
        with pytest.raises(fxzip.errors.SaveError, match="a tensor that is sparse"):
            zipped.save_pretrained(tmp_path / "zip")
    else:
        zipped.save_pretrained(tmp_path / "zip")
        loaded = fxzip.load(tmp_path / "zip")(x, EDGES)
        torch.testing.assert_close(loaded, zipped(x, EDGES), rtol=0, atol=0)
