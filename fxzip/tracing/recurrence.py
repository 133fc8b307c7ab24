"""Fused recurrent layers as products, sums and activations, step by step, for `fused_kernels`.

A layer reads `x` [time, batch, features], or packed, as rows with the number of sequences that go on at each step. Its
state has a row for each sequence; at a step the first so many rows are written anew:

    gates = x_t W_iᵀ + b_i, h W_hᵀ + b_h        h[:n] <- cell(gates, h[:n])

Where the kernels lay the gates: nn.RNN one, nn.GRU (reset, update, new), nn.LSTM (input, forget, cell, output).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]
"""What both products give, and the state (h,) or (h, c) -> the next state."""


def rnn_cell(activation: Callable[[Tensor], Tensor]) -> Cell:
    """Of `nn.RNN`.

    >>> rnn_cell(torch.relu)(torch.tensor([[1.0]]), torch.tensor([[2.0]]), (torch.zeros(1, 1),))
    (tensor([[3.]]),)
    """
    return lambda read, kept, state: (activation(read + kept),)


def lstm_cell(read: Tensor, kept: Tensor, state: State) -> State:
    """Of `nn.LSTM`: (h, c)."""
    enter, forget, new, leave = (read + kept).chunk(4, -1)
    cell = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def gru_cell(read: Tensor, kept: Tensor, state: State) -> State:
    """Of `nn.GRU`."""
    (read_reset, read_update, read_new), (reset, update, new) = read.chunk(3, -1), kept.chunk(3, -1)
    new = (read_new + (read_reset + reset).sigmoid() * new).tanh()
    return (new + (read_update + update).sigmoid() * (state[0] - new),)


CELLS: tuple[Cell, ...] = (rnn_cell(torch.relu), rnn_cell(torch.tanh), lstm_cell, gru_cell)
"""By the number that kernels give as `mode`."""


def layer(
    cell: Cell, x: Tensor, weights: Sequence[Tensor], state: State, *, reverse: bool = False, rows: Sequence[int] = ()
) -> tuple[Tensor, State]:
    """One layer in one direction: what it writes at each step, and its last state.

    Args:
        cell: of `CELLS`.
        x: [time, batch, features], or, with `rows`, [all rows, features].
        weights: (W_i, W_h), with biases (b_i, b_h) behind them, and with a projection its matrix at the end.
        state: [batch, features] each.
        reverse: from the last step to the first.
        rows: how many sequences go on at each step, the longest first, of packed sequences.
    """
    biased = len(weights) >= 4
    b_i, b_h = weights[2:4] if biased else (None, None)
    projection = weights[-1] if len(weights) in (3, 5) else None
    gates = F.linear(x, weights[0], b_i)
    steps = list(gates.split(list(rows)) if rows else gates.unbind(0))
    written = []
    for step in reversed(steps) if reverse else steps:
        n = step.shape[0]
        going, waiting = [part[:n] for part in state], [part[n:] for part in state]
        new = list(cell(step, F.linear(going[0], weights[1], b_h), tuple(going)))
        if projection is not None:
            new[0] = F.linear(new[0], projection)
        written.append(new[0])
        state = tuple(torch.cat([a, b]) if len(b) else a for a, b in zip(new, waiting, strict=True))
    if reverse:
        written.reverse()
    return torch.cat(written) if rows else torch.stack(written), state


def layers(
    cell: Cell, x: Tensor, weights: Sequence[Sequence[Tensor]], state: State, *,
    bidirectional: bool, rows: Sequence[int] = (),
) -> tuple[Tensor, State]:  # fmt: skip
    """Layers one upon another: what the last one writes, and all last states.

    Args:
        cell: of `CELLS`.
        x: [time, batch, features], or packed.
        weights: of every layer, and of its directions in turn, see `layer`.
        state: [layers times directions, batch, features] each.
        bidirectional: whether a layer runs in both directions, which lie side by side in what it writes.
        rows: see `layer`.
    """
    directions = (False, True) if bidirectional else (False,)
    ends: list[State] = []
    for first in range(0, len(weights), len(directions)):
        sides = []
        for k, reverse in enumerate(directions, first):
            y, end = layer(cell, x, weights[k], tuple(part[k] for part in state), reverse=reverse, rows=rows)
            sides.append(y)
            ends.append(end)
        x = torch.cat(sides, -1) if bidirectional else sides[0]
    return x, tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
