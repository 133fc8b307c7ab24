"""What a user may ask of widths and ranks, checked: one share for all, shares by name, or what the budget allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from ..errors import OptionError

Currency = Literal["latency", "flops", "memory", "parameters"]
"""What a cost is counted in: seconds on the device of the sample, FLOPs, bytes at the peak, numbers in parameters."""

Width = Literal["auto"] | float | Mapping[str, float]
"""As users write it: a share, shares by the names of spaces, or "auto"."""


@dataclass(frozen=True)
class Scaled:
    """Every space keeps this share of the features that the first model has in it."""

    share: float = 1.0


@dataclass(frozen=True)
class ScaledSpaces:
    """The spaces named keep these shares of the features that the first model has in them."""

    shares: Mapping[str, float]


@dataclass(frozen=True)
class Budget:
    """Features go where they are needed, so that the zip costs at most `cost` times what the first model does."""

    cost: float = 1.0
    currency: Currency = "flops"

    @property
    def noun(self) -> str:
        """The currency, in a sentence."""
        return {"flops": "FLOPs", "memory": "peak memory"}.get(self.currency, self.currency)

    @property
    def is_measured(self) -> bool:
        """Whether a sum over nodes is but an estimate, so that what a network takes is measured; else its report has
        it."""
        return self.currency in ("latency", "memory")

    def counted(self, report: Mapping[str, Any]) -> float:
        """What a zip takes by its report, relative to the first model, in a currency that is counted."""
        spent = report[self.currency]
        return float(spent["total"] / max(spent["originals"][0], 1))


WidthRequest = Scaled | ScaledSpaces | Budget
UNCHANGED = Scaled()

Rank = Width
"""As users write it: a share, shares by the names of calls, or "auto"."""


@dataclass(frozen=True)
class ScaledRanks:
    """Every call takes this share of what it would take as one."""

    share: float = 1.0


@dataclass(frozen=True)
class NamedRanks:
    """The calls named take these shares of what they would take as one."""

    shares: Mapping[str, float]


RankRequest = ScaledRanks | NamedRanks | Budget
WHOLE = ScaledRanks()


def currency(budget: str | None) -> Currency:
    """What a cost is counted in; None: seconds, which is what people wait for.

    Raises:
        OptionError: it is no currency.
    """
    if budget is None:
        return "latency"
    if not (isinstance(budget, str) and budget in get_args(Currency)):
        known = ", ".join(map(repr, get_args(Currency)))
        raise OptionError(f"`budget` must be one of {known}, what `max_cost` counts; found {budget!r}.")
    return cast("Currency", budget)


def width_request(width: Width, max_cost: float | None, models: int, budget: str | None = None) -> WidthRequest:
    """What `width`, `max_cost` and `budget` ask for, of a zip of so many models.

    >>> width_request(1.25, None, 2), width_request("auto", 1.3, 2, "flops")
    (Scaled(share=1.25), Budget(cost=1.3, currency='flops'))

    Args:
        width: a share in (0, models], a dict of them by space name, or "auto".
        max_cost: with "auto", what the zip may cost relative to the first model; None: 1. Otherwise it does not concern
            the widths.
        models: how many are zipped; with a share of that nothing need be merged.
        budget: what a cost is counted in, see `currency`.

    Raises:
        OptionError: a value is none of these, or out of range.
    """
    if isinstance(width, str):
        if width != "auto":
            raise OptionError(f'`width` must be a number, a dict of numbers by space, or "auto"; found {width!r}.')
        return _budget(max_cost, budget)

    for value in width.values() if isinstance(width, Mapping) else (width,):
        if not 0 < value <= models:
            raise OptionError(
                f"`width` must lie in (0, {models}], at {models} nothing of {models} models need be merged; found "
                f"{value!r}. Try 1.25."
            )
    return ScaledSpaces(dict(width)) if isinstance(width, Mapping) else Scaled(float(width))


def rank_request(rank: Rank, max_cost: float | None, budget: str | None = None) -> RankRequest:
    """What `rank`, `max_cost` and `budget` ask for.

    >>> rank_request(0.5, None), rank_request("auto", 1.3, "flops")
    (ScaledRanks(share=0.5), Budget(cost=1.3, currency='flops'))

    Args:
        rank: what calls are to take relative to what they take as one, in (0, 1]; a dict of that by the names of calls;
            or "auto".
        max_cost: with "auto", what the zip may cost relative to the first model; None: 1. Otherwise it does not concern
            the ranks.
        budget: what a cost is counted in, see `currency`.

    Raises:
        OptionError: a value is none of these, or out of range.
    """
    if isinstance(rank, str):
        if rank != "auto":
            raise OptionError(f'`rank` must be a number, a dict of numbers by call, or "auto"; found {rank!r}.')
        return _budget(max_cost, budget)

    for value in rank.values() if isinstance(rank, Mapping) else (rank,):
        if not 0 < value <= 1:
            raise OptionError(
                f"`rank` must lie in (0, 1], at 1 every call stays as it is, at 0.5 two calls take half of what one "
                f"does; found {value!r}. Try 0.5."
            )
    return NamedRanks(dict(rank)) if isinstance(rank, Mapping) else ScaledRanks(float(rank))


def _budget(max_cost: float | None, budget: str | None) -> Budget:
    if max_cost is not None and not max_cost > 0:
        raise OptionError(f"`max_cost` must be positive; found {max_cost!r}. Try 1.3, or 1.0 for the cost of one.")
    return Budget(1.0 if max_cost is None else float(max_cost), currency(budget))
