"""What a user may ask of a compile, checked and with the defaults filled in: one place for all entry points."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

from torch import Tensor, nn

from ..analysis.rules import Rule
from ..calibration.data_forms import MAX_BATCHES
from ..errors import OptionError
from ..matching import Method, resolve
from ..matching.weights_of_models import weighted
from ..refit import Refit, refits
from ..widths.requests import UNCHANGED, WHOLE, Budget, Currency, RankRequest, WidthRequest, currency
from .pairs import check_pair, is_least_squares, method_for, method_with_base

MethodName = Literal[
    "auto", "energy", "zip", "permute", "weights", "average", "agglomerative", "c2m3", "kmeans", "mudsc",
    "optimal", "recover", "transport", "task-arithmetic", "ties", "tsv", "iso-c",
]  # fmt: skip
RefitName = Literal["auto", "lstsq", "repair", "batchnorm", "stored", "regmean", "regmean++"]
Until = str | float | None
"""Where the trunk ends, by name or as a share of the FLOPs; None: at the heads."""


class CompileOptions(TypedDict, total=False):
    """The keyword arguments of `compile_zip`, which says what they mean."""

    data: Any
    method: MethodName | Method
    start: str | Sequence[str] | None
    until: Literal["auto"] | str | float | None
    width: Literal["auto"] | float | Mapping[str, float]
    rank: Literal["auto"] | float | Mapping[str, float]
    min_agreement: float | None
    max_cost: float | None
    budget: Currency | None
    refit: RefitName | Refit | None
    joint: bool
    hold_out: bool
    verify: bool
    strict: bool
    progress: bool | None
    max_batches: int
    rules: Mapping[str, Rule] | None
    base: nn.Module | Mapping[str, Tensor] | None
    weights: Sequence[float] | Mapping[str, float] | None
    resume: str | os.PathLike[str] | None


@dataclass(frozen=True)
class Recipe:
    """How to merge, how wide, and how to correct.

    Attributes:
        method: what decides which features are merged.
        refit: what corrects the zipped network.
        refit_name: what the report calls the refit.
        width: how many features the spaces keep.
        rank: which calls become two.
        data_free: nothing is read from data: the method looks at weights, the refit at stored statistics.
        automatic: the method was left open; for fine-tunes of one base it is another (see `one_base`).
        weights: of the models, for the method.
        nearness: the cosine by which the models were recognised as fine-tunes of one base; None: they were not.
    """

    method: Method
    refit: Refit
    refit_name: Any
    width: WidthRequest = UNCHANGED
    rank: RankRequest = WHOLE
    data_free: bool = False
    automatic: bool = False
    weights: tuple[float, ...] | None = None
    nearness: float | None = None

    @property
    def observes(self) -> bool:
        """Whether anything that is to be decided depends on what the data show."""
        return "moments" in self.method.needs or self.width != UNCHANGED

    @property
    def budget(self) -> Budget | None:
        """What the zip may cost, where widths or ranks are by need."""
        asked: tuple[WidthRequest | RankRequest, ...] = (self.width, self.rank)
        return next((own for own in asked if isinstance(own, Budget)), None)

    def within(self, budget: Budget) -> Recipe:
        """The same under another budget."""
        width = budget if isinstance(self.width, Budget) else self.width
        return replace(self, width=width, rank=budget if isinstance(self.rank, Budget) else self.rank)

    @property
    def narrows(self) -> bool:
        """Whether heads may keep fewer features: by need, and where least squares mends what that does to them."""
        return isinstance(self.width, Budget) and self.mends

    @property
    def mends(self) -> bool:
        """Whether the refit makes the best of whatever features there are: some inputs are enough to match by."""
        return is_least_squares(self.refit)

    @property
    def by_position(self) -> bool:
        """Whether features that cannot be matched may be averaged place by place."""
        return self.method.by_position

    @classmethod
    def of(
        cls,
        method: str | Method,
        refit: str | Refit | None,
        *,
        calibrated: bool,
        width: WidthRequest = UNCHANGED,
        rank: RankRequest = WHOLE,
        based: bool = False,
    ) -> Recipe:
        """The defaults filled in. `based`: the base is given that the models were fine-tuned from.

        `refit="auto"` is least squares where there is data, else REPAIR; where there is none and the method looks at
        weights only, it is "stored". `method="auto"` is `Energy` under least squares, `Permute` under RegMean, else
        ZipIt!.

        >>> Recipe.of("auto", "auto", calibrated=True).method, Recipe.of("auto", "repair", calibrated=True).method
        (Energy(floor=0.01, ridge=1e-05), Zip(alpha=1.0, beta=1.0))
        >>> Recipe.of("weights", "auto", calibrated=False).data_free
        True

        Raises:
            OptionError: one of them is unknown, or they do not go together (see `pairs`); or ranks are asked for, which
                least squares alone can fit.
        """
        automatic = isinstance(method, str) and method == "auto"
        weights_alone = based if automatic else "moments" not in resolve(method).needs
        data_free = not calibrated and weights_alone and _named(refit) in ("auto", "stored", None)
        if _named(refit) == "auto":
            refit = "stored" if data_free else "lstsq" if calibrated else "repair"

        corrected = refits(refit)
        if automatic:
            method = method_with_base(corrected) if based else method_for(corrected)

        chosen = resolve(method)
        check_pair(chosen, corrected)
        if rank != WHOLE and not is_least_squares(corrected):
            raise OptionError(
                f'`rank` needs `refit="lstsq"`, which fits calls of a given rank; found refit={refit!r}. '
                + ("Pass unlabelled `data`." if not calibrated else "Leave `refit` out.")
            )
        if isinstance(width, Budget) and rank != WHOLE and not isinstance(rank, Budget):
            raise OptionError(
                '`width="auto"` takes `rank` 1 or "auto": what calls cost by their ranks is part of the budget; found '
                'ranks that are given. Pass `rank="auto"`.'
            )
        open_still = automatic and not based  # what the networks are decides, too
        return cls(chosen, corrected, refit, width, rank, data_free, open_still)

    def weighing(self, weights: tuple[float, ...] | None) -> Recipe:
        """The same with weights of the models; where the method is still open they wait for it.

        Raises:
            OptionError: the method takes none.
        """
        if weights is None:
            return self
        if self.automatic:
            return replace(self, weights=weights)
        return replace(self, method=weighted(self.method, weights))


def _named(refit: str | Refit | None) -> str | None:
    """The name of a refit; "" for one that is an object."""
    return refit if refit is None or isinstance(refit, str) else ""


@dataclass(frozen=True)
class FixedCut:
    """The trunk ends where the user says."""

    until: Until = None


@dataclass(frozen=True)
class DeepestAgreeing:
    """The trunk ends as late as every head agrees with its original on this share of held-out inputs."""

    min_agreement: float = 0.98


@dataclass(frozen=True)
class EarliestAffordable:
    """The trunk ends as early as the zip costs at most so much, relative to the first model."""

    max_cost: float
    currency: Currency = "latency"


@dataclass(frozen=True)
class BestWithin:
    """Every cut costs `max_cost` by its widths; the trunk ends where the heads are closest to the originals."""

    max_cost: float


CutRequest = FixedCut | DeepestAgreeing | EarliestAffordable | BestWithin


def cut_request(
    until: Until, min_agreement: float | None, max_cost: float | None, *, by_need: bool, budget: Currency | None = None
) -> CutRequest:
    """What `until` and its goals ask for.

    >>> cut_request("auto", None, 1.3, by_need=False)
    EarliestAffordable(max_cost=1.3, currency='latency')

    Args:
        until, min_agreement, max_cost, budget: as in `compile_zip`.
        by_need: widths are chosen by need, which `max_cost` is for too.

    Raises:
        OptionError: the arguments contradict each other, or are out of range.
    """
    if budget is not None and max_cost is None and not by_need:
        raise OptionError(
            f"`budget` says what `max_cost` counts; found `budget={budget!r}` without it. Pass `max_cost`, with "
            '`width="auto"` or `until="auto"`.'
        )
    if until != "auto" and by_need:
        max_cost = None  # it is the widths' then
    given = {"min_agreement": min_agreement, "max_cost": max_cost}
    names = [f"`{name}={value!r}`" for name, value in given.items() if value is not None]
    if until != "auto":
        if names:
            raise OptionError(
                f'{" and ".join(names)} must go with `until="auto"`, which looks for a cut; found `until={until!r}`, '
                "a fixed one. Leave one of them out."
            )
        if not (until is None or isinstance(until, (str, int, float))):
            raise OptionError(f"`until` must be a name, a fraction or None; found a `{type(until).__name__}`.")
        return FixedCut(until)
    if len(names) == 2:
        raise OptionError(
            f'`until="auto"` takes one goal: `min_agreement` (the deepest cut that agrees) or `max_cost` (the '
            f"earliest cut that is cheap enough); found {' and '.join(names)}. Leave one of them out."
        )
    if min_agreement is not None and not 0 < min_agreement <= 1:
        raise OptionError(f"`min_agreement` must lie in (0, 1]; found {min_agreement!r}. Try 0.98.")
    if max_cost is not None and not max_cost > 0:
        raise OptionError(
            f"`max_cost` must be positive, relative to the first model alone; found {max_cost!r}. Try 1.3."
        )
    if by_need and max_cost is None:
        raise OptionError(
            '`until="auto"` with `width="auto"` needs `max_cost`: what the zip may take wherever the trunk ends; '
            f"found {names[0] if names else 'no goal'}. Try `max_cost=1.3`, or leave `width` out."
        )
    if max_cost is not None:
        return BestWithin(max_cost) if by_need else EarliestAffordable(max_cost, currency(budget))
    return DeepestAgreeing() if min_agreement is None else DeepestAgreeing(min_agreement)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What holds for all zips of one request, whatever their recipes and cuts.

    Attributes:
        start: where the trunk begins; None: at the input.
        joint: heads of classifiers are to tell their tasks apart.
        hold_out: a tenth of the inputs is kept out of all fits, for the report.
        verify: the analysis checks itself.
        strict: a place where features cannot be matched is an error.
        by_position: features that cannot be matched are averaged place by place.
        max_batches: most batches of each source that are read in a pass.
        rules: by ATen call; None: `fxzip.RULES`.
        data_free: nothing is read from data.
        base: parameters of the network that the models were fine-tuned from, by name; None: not given.
        compared_by: what compares zips on held-out inputs, as errors name it; for it a fifth of the inputs is
            held out, and ten of each source at least. "": nothing does.
    """

    start: str | Sequence[str] | None = None
    joint: bool = False
    hold_out: bool = True
    verify: bool = True
    strict: bool = False
    by_position: bool = False
    max_batches: int = MAX_BATCHES
    rules: Mapping[str, Rule] | None = None
    data_free: bool = False
    base: Mapping[str, Tensor] | None = None
    compared_by: str = ""

    def __post_init__(self) -> None:
        if not (self.rules is None or isinstance(self.rules, Mapping)):
            raise OptionError(f"`rules` must be a table by ATen call, `fxzip.RULES | ...`; found {self.rules!r:.80}.")
