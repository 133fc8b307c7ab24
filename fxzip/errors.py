"""Every error and warning that fxzip raises, so that a caller can name what to catch."""

from __future__ import annotations

from typing import Any


class FxzipError(Exception):
    """Base of all errors of fxzip."""


class TraceError(FxzipError):
    """No rung of the tracing ladder reproduces the model."""


class AlignError(FxzipError):
    """The models have no computation in common that could be shared."""


class DataError(FxzipError, ValueError):
    """Calibration data is empty, of the wrong shape, or gives non-finite features."""


class CutError(FxzipError, ValueError):
    """`until` names nothing, or something that is not shared."""


class BarrierError(FxzipError):
    """Raised by `strict=True`: calls without a rule stop the sharing of features."""


class RuleError(FxzipError):
    """A rule of the table gives something that cannot be fields of the call's result."""


class SelfCheckError(FxzipError):
    """The analysis failed its own check and pinning the culprits did not cure it."""


class InputError(FxzipError, TypeError):
    """The arguments of a public function do not fit together."""


class ContainerError(InputError):
    """Tensors are held by something that cannot be taken apart and put together again."""


class SpecializationError(FxzipError, ValueError):
    """A network is called with a number, a structure or a size that its graph was not made for."""


class OptionError(FxzipError, ValueError):
    """An option has a value that is out of its range, or a name that is unknown."""


class RecipeError(FxzipError, ValueError):
    """A recipe of the command line names something that is not there, or that does not fit."""


class CostError(OptionError):
    """`max_cost` is less than what has to keep its size takes."""


class LoadError(FxzipError):
    """A file is not as it was written, or names a function, a method or an attribute that a stored network may not
    call."""


class SaveError(FxzipError):
    """A network holds what a saved folder cannot hold, or the folder holds something else."""


class ProcessError(FxzipError):
    """Under `torch.distributed`: another process has failed, has gone another way, or cannot be reached."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a search or a table, with what was done by then.

    Attributes:
        zipped: the best network so far; None where a table was being made.
        table: the rows so far; None where a search was going on.
    """

    def __init__(self, message: str, *, zipped: Any = None, table: Any = None) -> None:
        super().__init__(message)
        self.zipped = zipped
        self.table = table


class FxzipWarning(UserWarning):
    """Base of all warnings of fxzip."""


class PinnedSpaceWarning(FxzipWarning):
    """A feature space failed the self-check and is not merged."""


class CalibrationWarning(FxzipWarning):
    """There is no calibration data, or less than matching and fits need."""


class TrunkWarning(FxzipWarning):
    """Little can be shared, or more could be shared exactly."""
