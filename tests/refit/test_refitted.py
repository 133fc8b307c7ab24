"""Refits with and without something to say for the report."""

import torch
from models import randomise
from torch import nn

import fxzip
from fxzip.refit import Refitted, refit_with_notes, refits

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


def pair():
    return [
        randomise(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, n)), n)
        for n in (2, 3)
    ]


def zipped(refit):
    return fxzip.compile_zip(*pair(), X, data=[X], method="permute", refit=refit, progress=False)


def test_a_plain_function_is_a_refit():
    def doubled(network, plan, data):
        assert len(list(data)) == 1
        with torch.no_grad():
            network.get_parameter("trunk.0.weight").mul_(2)
        return network

    plain, own = zipped(None), zipped(doubled)
    torch.testing.assert_close(own.get_parameter("trunk.0.weight"), 2 * plain.get_parameter("trunk.0.weight"))


def test_what_a_refit_has_to_say_is_in_the_report():
    class Saying:
        def __call__(self, network, plan, data):
            return self.refitted(network, plan, data).module

        def refitted(self, network, plan, data):
            return Refitted(network, ("it was left alone",))

    assert "it was left alone" in zipped(Saying()).report["notes"]
    for name in ("batchnorm", "stored"):
        assert any("the refit changed nothing" in note for note in zipped(name).report["notes"])
    assert any("least squares fitted" in note for note in zipped("lstsq").report["notes"])


def test_by_hand_a_refit_gives_the_network():
    network = zipped(None)
    assert refits("batchnorm")(network, None, []) is not network
    found = refit_with_notes(refits("batchnorm"), network, None, [])
    assert isinstance(found.module, fxzip.ZippedModule)
    assert found.notes == ("the networks have no BatchNorm with statistics: the refit changed nothing",)
    assert refit_with_notes(refits(None), network, None, []).notes == ()
