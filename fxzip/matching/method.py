"""What a method of matching is: a frozen dataclass of settings that gives every feature space of a problem its merge.

`Method` is the protocol. `SpaceMethod` is for those that look at one space at a time, at nothing but its moments: it
takes care of spaces that were not observed, of those in which only relabellings are legal, and of blocks that move
together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from .blockwise import BlockMoments, match_blocks
from .merge import Merge
from .moments import Moments
from .problem import Evidence, Problem, Space


class Method(ABC):
    """How features are matched.

    >>> from fxzip.matching import WeightMatching, Zip
    >>> sorted(Zip().needs | WeightMatching().needs)
    ['moments', 'weights']
    >>> Zip(alpha=0.5).relabelling(), WeightMatching(seed=1).relabelling() == WeightMatching(seed=1)
    (Permute(), True)

    Attributes:
        name: in `fxzip.METHODS`, in messages.
        by_position: whether it takes feature i of every model for the same feature, whatever the evidence.
    """

    name: ClassVar[str]
    by_position: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Evidence]:
        """The evidence that it asks for."""
        return frozenset({"moments"})

    @property
    def one_to_one(self) -> bool:
        """Whether it pairs the features of models of equal widths one to one, and so does nothing but relabel."""
        return False

    @abstractmethod
    def match(self, problem: Problem) -> Sequence[Merge]:
        """A merge for every space of the problem, in order.

        Raises:
            InputError, DataError: the problem cannot be solved by this method; see there.
        """

    def relabelling(self) -> Method:
        """The method to use where only relabellings are legal: itself if it is one, else `Permute`."""
        return self if self.one_to_one else _permute()


class SpaceMethod(Method):
    """A method that matches each space by itself, called with its moments.

    >>> import torch
    >>> from fxzip.matching import Permute, Problem, Space
    >>> from fxzip.matching.moments import moments
    >>> x = torch.randn(99, 3)
    >>> seen, unseen = Space((3, 3), moments=moments([x, x[:, [2, 0, 1]]])), Space((2, 3))
    >>> [merge.assignment(1).tolist() for merge in Permute().match(Problem((seen, unseen)))]
    [[2, 0, 1], [0, 1, 1]]
    """

    @abstractmethod
    def __call__(self, moments: Moments, size: int) -> Merge:
        """The merge of N features of K models to `size` features."""

    def relabelling(self) -> SpaceMethod:
        """The method to use where only relabellings are legal: itself if it is one, else `Permute`."""
        return self if self.one_to_one else _permute()

    def match(self, problem: Problem) -> list[Merge]:
        """A merge for every space: free ones on their own, tied ones block by block.

        Where nothing was observed, features are left in their positions: see `unseen` for what weights say of them.

        Raises:
            InputError, DataError: as the call does.
        """
        merges: dict[int, Merge] = {}
        for together in problem.ties():
            first = problem.spaces[together[0]]
            if first.tie is not None:
                found, _ = match_blocks([_block_moments(problem.spaces[number]) for number in together], self)
                merges.update(zip(together, found, strict=True))
            elif first.moments is None:
                merges[together[0]] = _by_position(first.sizes)
            else:
                legal = self if first.legality == "free" else self.relabelling()
                merges[together[0]] = legal(first.moments, first.size)

        return [merges[number] for number in range(len(problem.spaces))]


def _permute() -> SpaceMethod:
    from .activations.permute import Permute  # here, for it is a method itself

    return Permute()


def _by_position(sizes: tuple[int, ...]) -> Merge:
    """Feature i with feature i, those beyond the first model's with its last."""
    return Merge.from_clusters(torch.cat([torch.arange(n, device="cpu").clamp(max=sizes[0] - 1) for n in sizes]), sizes)


def _block_moments(space: Space) -> BlockMoments:
    seen, total = space.moments, sum(space.sizes)
    if seen is None:
        zero = torch.zeros(total, total, dtype=torch.float64, device="cpu")
        seen = Moments(0.0, zero.diagonal().clone(), zero, space.sizes)
    return BlockMoments(seen, space.blocks, space.legality == "relabel only")
