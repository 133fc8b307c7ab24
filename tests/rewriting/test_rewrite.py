"""The emitted module: where its weights come from, what its nodes say, that no input moved."""

import pytest
import torch
from models import randomise
from models.networks import Residual
from torch.utils.flop_counter import FlopCounterMode

import fxzip
from fxzip.rewriting.zip_plan import plan
from fxzip.tracing.provenance import provenance_of

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def planned(models, until=None, method=None):
    programs = [fxzip.tracing.trace(model, X[:2]) for model in models]
    labellings = [fxzip.analysis.label(program, fxzip.RULES) for program in programs]
    trunk = fxzip.partition.find_trunk(fxzip.partition.align(programs), labellings, until=until)
    calibration = fxzip.calibration.Calibration.of([X], programs[0].call, len(models), False)
    return plan(trunk, fxzip.calibration.observe(trunk, calibration("observing")), method or fxzip.Permute())


@pytest.fixture(scope="module")
def models():
    return [randomise(Residual(4), 1).double(), randomise(Residual(5), 2).double()]


def test_merged_weights_are_m_w_u(models):
    """W* = Σ M_k W_k U_k, written out for one convolution between two spaces."""
    zipping = planned(models)
    zipped = fxzip.rewriting.rewrite(zipping)
    spaces = {space.name: number for number, space in enumerate(zipping.trunk.spaces[0].spaces)}
    inner, stream = (zipping.merges[spaces[name]] for name in ("layer1.0.conv1.weight", "stem.0.weight"))
    wanted = sum(
        torch.einsum("ij,jchw,ck->ikhw", inner.M(k), model.layer1[0].conv1.weight.detach(), stream.U(k))
        for k, model in enumerate(models)
    )
    torch.testing.assert_close(
        zipped.get_parameter("trunk.layer1.0.conv1.weight").detach(), wanted, rtol=1e-12, atol=1e-12
    )


def test_each_node_says_what_it_stands_for(models):
    zipping = planned(models, until="layer1")
    zipped = fxzip.rewriting.rewrite(zipping)
    parts = {provenance_of(node).part for node in zipped.graph.nodes}
    assert parts == {"trunk", "head 0", "head 1"}
    programs = zipping.trunk.alignment.programs
    for node in zipped.graph.nodes:
        made = provenance_of(node)
        if made.part == "trunk":
            for k, name in enumerate(made.sources):
                twin = next(n for n in programs[k].module.graph.nodes if n.name == name)
                assert twin.op == node.op


def test_the_trunk_runs_once(models):
    """FLOPs of the zip are those of the trunk once and of each head."""
    x = X[:1]

    def flops(net):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(x)
        return counter.get_total_flops()

    full, partial = (fxzip.rewriting.rewrite(planned(models, until=cut)) for cut in (None, "layer1"))
    alone = [flops(model) for model in models]
    assert alone[0] <= flops(full) < 1.02 * alone[0]
    assert alone[0] < flops(partial) < sum(alone)


def test_nothing_of_the_inputs_is_shared_or_moved(models):
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    zipped = fxzip.rewriting.rewrite(planned(models))
    with torch.no_grad():
        for parameter in zipped.parameters():
            parameter.fill_(7.0)
    for model, state in zip(models, before, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])


def test_heads_are_not_touched_where_nothing_folds_into_them(models):
    """Parameters of a head behind its first linear calls are the model's own."""
    zipped = fxzip.rewriting.rewrite(planned(models, until="stem"))
    for k, model in enumerate(models):
        for name in ("linear.weight", "layer2.0.conv2.weight"):
            assert torch.equal(zipped.get_parameter(f"head_{k}.{name}"), model.get_parameter(name))
