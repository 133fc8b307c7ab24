"""Heads that compute the same on values of the same shapes, in one batched or grouped call instead of K.

`twins` finds the calls that all heads make, `rules` says along which axis heads may lie one after another in each,
`emit` writes the graph, and `one_head` takes one head out of it again.
"""

from .emit import PART, BatchedCall, batchable, emitted
from .padding import padded
from .twins import Values, alike, values_of

__all__ = ["PART", "BatchedCall", "Values", "alike", "batchable", "emitted", "padded", "values_of"]
