"""Which methods and refits go together: one table, looked up before anything is traced.

RegMean takes the linear calls of all models for calls on the same features, so it stands behind methods that pair
features one to one. Every other refit takes whatever merges there are. `docs/methods.md` prints the table.
"""

from __future__ import annotations

from dataclasses import replace

from ..errors import OptionError
from ..matching import ENTRIES, Method
from ..refit import REFITS, LeastSquares, Refit, RegMean, fit_least_squares


def is_least_squares(refit: Refit) -> bool:
    """Whether the refit solves every linear call anew, and so makes the best of whatever features there are."""
    return refit is fit_least_squares or isinstance(refit, LeastSquares)


def rough(refit: Refit) -> Refit:
    """A refit that takes less time, good enough to compare zips by: least squares on half of the samples.

    >>> rough(fit_least_squares).positions, rough(REFITS["repair"]) is REFITS["repair"]
    (10, True)
    """
    if not is_least_squares(refit):
        return refit
    own = refit if isinstance(refit, LeastSquares) else LeastSquares()
    return replace(own, positions=max(own.positions // 2, 1), least=max(own.least // 2, 1), scarce=own.scarce // 2)


def needs_pairs(refit: Refit) -> bool:
    """Whether the refit asks for features that are paired one to one."""
    return isinstance(refit, RegMean)


def method_for(refit: Refit) -> str:
    """What `method="auto"` is in front of a refit.

    >>> [method_for(REFITS[name]) for name in ("lstsq", "repair", "regmean")]
    ['energy', 'zip', 'permute']
    """
    if is_least_squares(refit):
        return "energy"
    return "permute" if needs_pairs(refit) else "zip"


def method_for_fine_tunes(refit: Refit) -> str:
    """The same for networks that are recognised as fine-tunes of one base (see `one_base`).

    Least squares makes more of features that are merged across places as well: docs/results.md, Fine-tunes of one base.
    """
    return "energy" if is_least_squares(refit) else "average"


def method_with_base(refit: Refit) -> str:
    """The same where the base is given, which says that the networks are fine-tunes of it.

    >>> [method_with_base(REFITS[name]) for name in ("lstsq", "repair", "regmean")]
    ['energy', 'tsv', 'average']
    """
    if is_least_squares(refit):
        return "energy"
    return "average" if needs_pairs(refit) else "tsv"


def check_pair(method: Method, refit: Refit) -> None:
    """A method and a refit must go together.

    Raises:
        OptionError: they do not.
    """
    if needs_pairs(refit) and not method.one_to_one:
        raise OptionError(
            f"`{refit!r}` needs a method that pairs features one to one; found `{method!r}`, which does not. Use "
            '`method="permute"`, or `method="average"` for networks fine-tuned from one initialisation.'
        )


def go_together(method: Method, refit: Refit) -> bool:
    """Whether `check_pair` has nothing to say."""
    try:
        check_pair(method, refit)
    except OptionError:
        return False
    return True


def table_of_pairs() -> str:
    """All methods by all refits, as Markdown; methods that go with the same refits share a row.

    Bold: what `method="auto"` is in front of the refit.
    """
    head = "| method | " + " | ".join("none" if name is None else f"`{name}`" for name in REFITS) + " |"
    rows: dict[tuple[str, ...], list[str]] = {}

    for name, entry in ENTRIES.items():
        cells = []
        for refit in REFITS.values():
            good = "yes" if go_together(entry.method(), refit) else "no"
            cells.append(f"**{good}**" if method_for(refit) == name else good)
        rows.setdefault(tuple(cells), []).append(f"`{name}`")

    lines = [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in rows.items()]
    return "\n".join([head, "|---" * (len(REFITS) + 1) + "|", *lines])
