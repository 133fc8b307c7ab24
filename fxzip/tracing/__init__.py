"""From a model and a sample input to a graph that reproduces the model: `trace` gives a `Program`.

`preparation` makes the own copy; `symbolic`, `values` and `exporting` are the rungs; `tidying` and `inplace` normalise
the graph; `execution` runs and compares, with `randomness`, `attention`, `threads` and `state` so
that a run is felt nowhere else; `training` looks at what is random in train mode only;
`ladder` puts them together.
"""

from .execution import (
    TOLERANCE,
    Record,
    difference,
    flat_inputs,
    modes_kept,
    quiet_execution,
    run_eager,
    run_recorded,
)
from .fused_kernels import InParts
from .guards import guards_at_entry, require
from .ladder import RUNGS, Program, trace
from .plain_contexts import plain_context
from .preparation import check_model, check_placement
from .python_numbers import is_number
from .training import names_of

__all__ = [
    "RUNGS",
    "TOLERANCE",
    "InParts",
    "Program",
    "Record",
    "check_model",
    "check_placement",
    "difference",
    "flat_inputs",
    "guards_at_entry",
    "is_number",
    "modes_kept",
    "names_of",
    "plain_context",
    "quiet_execution",
    "require",
    "run_eager",
    "run_recorded",
    "trace",
]
