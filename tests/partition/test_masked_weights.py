"""Masked weights: zips keep masks over places of a kernel, and name masks over features that they do not keep."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip


class MaskedConv(nn.Conv2d):
    """The first places of the kernel only, in the order of reading: as in PixelCNN."""

    def __init__(self, inputs: int, outputs: int, *, center: bool) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        mask = torch.zeros(9)
        mask[: 4 + center] = 1
        self.register_buffer("mask", mask.reshape(3, 3).expand_as(self.weight).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=1)


def pixels() -> nn.Module:
    layers = [MaskedConv(2, 8, center=False), nn.ReLU(), MaskedConv(8, 8, center=True), nn.ReLU(), nn.Conv2d(8, 3, 1)]
    return nn.Sequential(*layers).eval()


class MaskedLinear(nn.Linear):
    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def made(way: type[nn.Linear] = MaskedLinear) -> nn.Module:
    """Output i depends on the inputs in front of i."""
    place, hidden = torch.arange(6), torch.arange(20) % 5
    first, last = hidden[:, None] >= place, place[:, None] > hidden
    middle = hidden[:, None] >= hidden
    return nn.Sequential(way(first.float()), nn.ReLU(), way(middle.float()), nn.ReLU(), way(last.float())).eval()


class Filled(nn.Linear):
    """The same mask, in another way."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask == 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.masked_fill(self.mask, 0.0), self.bias)


class Positive(nn.Linear):
    """Half of the weights happen to be 0: no mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.relu(), self.bias)


@pytest.mark.parametrize("refit", [None, "repair", "lstsq"])
def test_a_zip_reads_no_place_of_a_kernel_that_the_originals_do_not_read(refit: str | None) -> None:
    a, b, x = pixels(), pixels(), torch.randn(48, 2, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxzip.TrunkWarning)
        zipped = fxzip.compile_zip(a, b, x[:4], data=[x], refit=refit, progress=False)
    later = x[:1].clone()
    later[..., 3, 3:] += 1
    later[..., 4:, :] += 1
    for own, other in zip(zipped(x[:1]), zipped(later), strict=True):
        assert (own != other).any()
        torch.testing.assert_close(own[..., :3, :], other[..., :3, :], rtol=0, atol=0)
        torch.testing.assert_close(own[..., 3, :4], other[..., 3, :4], rtol=0, atol=0)


def test_masks_over_features_are_named() -> None:
    a, b, x = made(), made(), torch.randn(64, 6)
    with pytest.warns(fxzip.TrunkWarning, match="`linear`, `linear_1` are masked, feature by feature"):
        zipped = fxzip.compile_zip(a, b, x[:4], data=[x], refit=None, progress=False)
    assert zipped.report["cut"]["masked"] == ["linear", "linear_1"]
    assert sum("are masked" in note for note in zipped.report.notes) == 1


def test_a_mask_by_place_keeps_features_in_order() -> None:
    a, b, x = made(Filled), made(Filled), torch.randn(64, 6)
    with pytest.raises(fxzip.AlignError, match="`masked_fill` ends the trunk"):
        fxzip.compile_zip(a, b, x[:4], data=[x], refit=None, progress=False)


def test_weights_that_happen_to_be_0_are_no_mask() -> None:
    a, b, x = made(Positive), made(Positive), torch.randn(64, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxzip.TrunkWarning)
        zipped = fxzip.compile_zip(a, b, x[:4], data=[x], refit=None, progress=False)
    assert zipped.report["cut"]["masked"] == []
