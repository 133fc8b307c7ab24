"""Is this zip good? Agreement on held-out inputs, latency, and what the user should be warned of."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import CalibrationWarning, FxzipWarning, TrunkWarning
from ..partition.masks import about_masks
from ..rewriting.module import ZippedModule
from ..rewriting.report import Report
from ..tracing.calls import Call
from .memory import peaks
from .session import Session
from .timing import as_used, fastest

SMALL_TRUNK = 0.2
"""A trunk of less than this share of the first model's FLOPs is worth a warning where the graphs diverge."""


def judged(session: Session, zipped: ZippedModule) -> Report:
    """The report of a zip, with "agreement", "latency" and "memory", and with warnings given and noted.

    "agreement" holds, on inputs that nothing was fitted on, "inputs" (how many, per head) and "heads" (of each
    "same_class", "relative_error" and "r_squared", see `calibration/agreement.py`); None where none were held out.
    "latency" holds "zipped", "originals" (each) and "side_by_side", in seconds on the sample input; "memory" the same
    in bytes at the peak.
    """
    report = zipped.report
    programs = session.survey.alignment.programs
    originals, call = [as_used(program.module) for program in programs], programs[0].sample
    values = {
        "agreement": _agreement(session, zipped),
        "memory": memory(zipped, originals, call),  # first: it warms up what is timed
        "latency": latency(zipped, originals, call),
    }
    warned = [*_about_data(session, report), *_about_the_trunk(session, report)]
    for kind, text in warned:
        warnings.warn(text, kind, stacklevel=5)
    known = set(report.notes)
    return Report({**report.as_dict(), **values}).noting(*(text for _, text in warned if text not in known))


def _agreement(session: Session, zipped: ZippedModule) -> dict[str, Any] | None:
    if session.held is None:
        return None
    heads = [
        {"same_class": head.same_class, "relative_error": head.relative_error, "r_squared": head.r_squared}
        for head in session.held.compared(zipped)
    ]
    return {"inputs": list(session.held.inputs), "heads": heads}


def latency(zipped: ZippedModule, originals: Sequence[nn.Module], call: Call) -> dict[str, Any]:
    """Seconds that the zipped network, each original and all of them take on an input, interleaved in one run.

    Each figure is the least of several.
    """
    seconds = fastest([zipped, *originals], call)
    return {"zipped": seconds[0], "originals": seconds[1:], "side_by_side": sum(seconds[1:])}


def memory(zipped: ZippedModule, originals: Sequence[nn.Module], call: Call) -> dict[str, Any]:
    """Peak bytes of the zipped network, of each original and of all of them on an input: parameters, and the tensors
    that live at once."""
    own = peaks(originals, call)
    return {"zipped": peaks([zipped], call).together, "originals": own.each, "side_by_side": own.together}


def _about_data(session: Session, report: Mapping[str, Any]) -> list[tuple[type[FxzipWarning], str]]:
    """No data, or less than one input for each feature of the widest space."""
    calibration = session.calibration
    if not calibration.sources:
        return []
    if not calibration.given:
        return [(CalibrationWarning, calibration.notes[0])]
    widest = max(report["spaces"], key=lambda space: int(space["size"]), default=None)
    inputs = calibration.inputs
    if widest is None or inputs is None or inputs >= widest["size"]:
        return []
    text = (
        f"`data` holds {inputs} inputs to fit on, fewer than the {widest['size']} features of the space "
        f"`{widest['name']}`; pass more unlabelled inputs, some hundreds at least"
    )
    return [(CalibrationWarning, text)]


def _about_the_trunk(session: Session, report: Mapping[str, Any]) -> list[tuple[type[FxzipWarning], str]]:
    """A small trunk where the graphs diverge, masks that are not kept, first layers that the models have in common."""
    found: list[tuple[type[FxzipWarning], str]] = []
    if report["cut"]["masked"]:
        found.append((TrunkWarning, about_masks(report["cut"]["masked"])))
    parting = report["cut"]["parting"]
    one, trunk = sum(session.survey.flops[0].values()), report["flops"]["trunk"]
    if any(parting) and trunk < SMALL_TRUNK * one:
        share = 100 * trunk / max(one, 1)
        text = f"the trunk is {share:.0f} % of the first model, since the graphs diverge: the first {parting[0]}"
        found.append((TrunkWarning, text))

    exact = session.survey.shared_layers
    if exact is not None and trunk > session.survey.shared_flops:
        text = f"the models share their first layers, to the bit: `until={exact.until!r}` is exact"
        found.append((TrunkWarning, text))
    return found
