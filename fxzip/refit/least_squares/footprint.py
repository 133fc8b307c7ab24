"""What a fit takes in memory, told before it begins: the values of networks, and the regressions.

Counted is what tensors take, as the code makes them; what a library needs inside one of its kernels is not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...tracing import Program
from ...tracing.calls import Call, batch_size, map_tensors
from ...tracing.containers import leaves
from ...tracing.execution import flat_inputs, quiet_execution, storage_of
from ..linear_calls.units import Unit

MOST = 2 << 30
"""Bytes that the samples of one regression may take; of one that needs more, fewer positions are drawn."""


def row_bytes(inputs: int, outputs: int, itemsize: int) -> int:
    """What a position of a regression takes: inputs as drawn, and with a column of ones; targets, summands, the
    originals' features, what is left of them."""
    return (4 * inputs + 10 * outputs) * itemsize


@dataclass(frozen=True)
class RegressionSize:
    """How large the regression of a unit is.

    Attributes:
        inputs: of each output, d.
        outputs: n, of all groups.
        groups: how many regressions there are, one after another.
        places: of all its calls, for each input of the network.
        calls: how many there are.
        features: of the originals that may be told in other ways, N at most.
        itemsize: bytes of a value.
    """

    inputs: int
    outputs: int
    groups: int
    places: float
    calls: int
    features: int
    itemsize: int

    def positions(self, wished: tuple[int, int], rows: float) -> float:
        """How many are drawn of so many inputs of the network; `wished`: per input, and at least."""
        each, least = wished
        row = row_bytes(self.inputs * self.groups, self.outputs, self.itemsize)
        return min(max(least, each * self.inputs), MOST / row, self.places * rows)

    def drawn(self, positions: float) -> float:
        """Bytes of the samples: inputs, targets, summands, the originals' features."""
        return positions * (self.inputs * self.groups + 2 * self.outputs + self.features) * self.itemsize

    def work(self, positions: float, scarce: float, *, on_file: bool) -> float:
        """Bytes that the solution takes beside the samples. `scarce`: positions for each input, below which the ridge
        is chosen by trying; `on_file`: inputs are not kept in memory."""
        width, item = self.inputs + 1, self.itemsize
        kept = 0.0 if on_file or item >= 4 else 4 * positions * width  # in float32
        values = (0.0 if on_file else 6.0) * positions * self.outputs * item
        weights = 8.0 * 8 * width * self.outputs
        square = 3.0 * 8 * min(width, positions) ** 2  # the matrix, with the ridge, and its factor
        whole = positions * width * item if positions < width else 0.0
        most = square + whole + 3.0 * 8 * self.features**2
        if positions < scarce * self.inputs:
            half = 4.0 * 8 * min(width, positions / 2) ** 2  # the matrices of both, one with the ridge, its factor
            both = positions * width * item if positions / 2 < width else 0.0
            most = max(most, kept + half + both)  # the two halves are copies
        return kept + values + weights + most

    def drawing(self, positions: float, batches: int) -> float:
        """Bytes that come and go while the inputs of one call on one batch are taken out."""
        return 2.0 * positions / max(batches * self.calls, 1) * self.inputs * self.groups * self.itemsize


def size_of(unit: Unit, rows: int, told: int) -> RegressionSize:
    """The regression of a unit, whose calls were seen on so many inputs of the network; `told`: how many originals
    there are whose features it may tell in another way."""
    kernel = unit.kernel
    if kernel is None:
        own = next(value for value in (unit.scale, unit.shift) if value is not None)
        places = sum(site.shape.numel() for site in unit.sites) / max(own.numel(), 1) / rows
        return RegressionSize(1, own.numel(), 1, places, len(unit.sites), 0, 8)
    groups, outputs, inputs = kernel.flat.shape
    places = sum(site.shape.numel() for site in unit.sites) / (groups * outputs) / rows
    features = outputs * told if groups == 1 else 0
    return RegressionSize(
        inputs, groups * outputs, groups, places, len(unit.sites), features, kernel.weight.element_size()
    )


class _Living(fx.Interpreter):
    """Runs a graph; the most bytes that its values took at a time. What shares memory counts once."""

    def __init__(self, module: fx.GraphModule, apart: Collection[int]) -> None:
        super().__init__(module)
        self.most = 0
        self._apart = apart  # storages that are there anyway

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        held = {storage_of(own): own.untyped_storage().nbytes() for own in _strided([*self.env.values(), value])}
        self.most = max(self.most, sum(size for key, size in held.items() if key not in self._apart))
        return value


def _strided(values: Any) -> Iterable[Tensor]:
    return (own for own in leaves(values) if own.layout == torch.strided and own.device.type != "meta")


def live_bytes(module: fx.GraphModule, call: Call) -> float:
    """Peak of the bytes that the values of all live nodes take, per row of the batch, without inputs and parameters."""
    own = map_tensors(torch.clone, call)
    inputs = flat_inputs(module, own)
    held = (*module.parameters(), *module.buffers(), *_strided(list(inputs)))
    living = _Living(module, {storage_of(value) for value in held if value.layout == torch.strided})
    with quiet_execution():
        living.run(*inputs, enable_io_processing=False)
    return living.most / max(batch_size(call) or 1, 1)


def bytes_per_row(net: fx.GraphModule, programs: Sequence[Program]) -> float:
    """What an input takes in a walk: the values that live at a time in the originals and in the zipped network, of its
    own widths, and the input itself, which is held all the time."""
    call = programs[0].small_call
    held = sum(value.nbytes for value in leaves((call.args, call.kwargs))) / max(batch_size(call) or 1, 1)
    return live_bytes(net, call) + held + sum(live_bytes(own.module, own.small_call) for own in programs)


def parameter_bytes(net: nn.Module) -> int:
    """What a copy of a network takes."""
    return sum(math.prod(value.shape) * value.element_size() for value in (*net.parameters(), *net.buffers()))
