"""The driver: a call per stage. Reading this file is reading the architecture.

trace -> align -> label, self-check -> find_trunk -> observe -> plan -> rewrite -> refit -> report
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .align import align
from .analysis import Labelling, label, self_check
from .calibration import Calibration
from .errors import BarrierError, InputError
from .inputs import as_call
from .inspection import Inspection
from .matching import Method, resolve
from .observe import observe
from .plan import plan
from .refit import Refit, fit_notes, refits
from .report import flops_by_node, make_report
from .rewrite import rewrite
from .rules import RULES, Rule
from .tracing import check_model, check_placement, trace
from .trunk import find_trunk
from .zipped import ZippedModule, reuse_memory


def compile_zip(
    *models: Any,
    data: Any = None,
    method: str | Method = "zip",
    until: str | float | None = None,
    refit: str | Refit | None = "repair",
    verify: bool = True,
    strict: bool = False,
    progress: bool | None = None,
    rules: Mapping[str, Rule] = RULES,
) -> ZippedModule:
    """Zip trained networks of one architecture into one multi-task network, without training.

    `compile_zip(a, b, sample_input)` or `compile_zip([a, b, c, ...], sample_input)`.

    >>> import torch, fxzip
    >>> from torch import nn
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
    >>> zipped = fxzip.compile_zip(a, b, torch.randn(16, 4))
    >>> [tuple(y.shape) for y in zipped(torch.randn(5, 4))]
    [(5, 2), (5, 3)]

    Args:
        models: two models, or a sequence of any number of them, and then the sample input: a tensor, or a tuple or
            dict of tensors, with a batch on axis 0.
        data: unlabelled calibration data: an iterable of batches (a tensor; a tuple or list whose first item is the
            input; a dict), or one such iterable per model. None: the sample input serves.
        method: "zip" (ZipIt!, arXiv 2305.03053), "permute" (Git Re-Basin, arXiv 2209.04836), "average", or an object
            with its settings such as `fxzip.Zip(alpha=0.1, beta=0.5)`.
        until: where the trunk ends: None (at the heads), a module path or node name of the first model, or a fraction
            in (0, 1] of the FLOPs to share.
        refit: None, "batchnorm" (statistics re-estimated), "repair" (REPAIR, arXiv 2211.08403), "lstsq" (least squares,
            closed form, layer by layer), or an object with its settings such as `fxzip.LeastSquares(ridge=1e-3)`.
        verify: check the analysis by relabelling at random.
        strict: raise `BarrierError` where a call without a rule stops the sharing.
        progress: show a bar; None: on a terminal only.
        rules: rule table for ATen calls, `fxzip.RULES | {...}`.

    Returns:
        A `torch.fx.GraphModule` in eval mode. It takes what the models take and returns a tuple with each model's
        output. `.single(i)` is the network of one task, `.report` says what was shared.

    Raises:
        InputError, TraceError, AlignError, CutError, DataError, BarrierError, SelfCheckError: see `fxzip.errors`.
    """
    networks, call = _arguments(models)
    check_placement(networks)
    chosen, corrected = resolve(method), refits(refit)
    programs = [trace(model, call, name=f"model {k}") for k, model in enumerate(networks)]
    calibration = Calibration.of(data, programs[0].call, len(programs), progress)
    alignment = align(programs)
    labellings = [label(program, rules) for program in programs]
    if strict:
        _no_barriers(labellings)
    checks = [self_check(labelling) if verify else None for labelling in labellings]
    pinned = [check[2] if check else {} for check in checks]
    flops = flops_by_node(programs[0].module, programs[0].call) if isinstance(until, float) else None
    trunk = find_trunk(alignment, labellings, until=until, flops=flops, pinned=pinned)
    statistics = observe(trunk, calibration("observing"))
    zipping = plan(trunk, statistics, chosen)
    zipped = rewrite(zipping)
    zipped = corrected(zipped, zipping, calibration("refitting"))
    reuse_memory(zipped)
    settings = {
        "method": repr(chosen),
        "refit": refit,
        "data": calibration.description,
        "self_check": [check[1] if check else None for check in checks],
        "notes": [*calibration.notes, *fit_notes(zipped)],
    }
    zipped.meta["fxzip_report"] = make_report(zipped, zipping, settings)
    return zipped


def inspect(
    model: nn.Module, sample_input: Any, *, verify: bool = True, rules: Mapping[str, Rule] = RULES
) -> Inspection:
    """Feature spaces, ties, barriers and possible cuts of one model; printable.

    >>> import torch, fxzip
    >>> from torch import nn
    >>> found = fxzip.inspect(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4))
    >>> [(space.name, space.size, space.legality) for space in found.spaces]
    [('0.weight', 8, 'free')]
    """
    program = trace(check_model(model), as_call(sample_input))
    labelling = label(program, rules)
    return Inspection.of(labelling, *(self_check(labelling)[:2] if verify else (None, None)))


def _arguments(models: Sequence[Any]) -> tuple[list[nn.Module], Any]:
    """Split the positional arguments into models and sample input."""
    if len(models) == 2 and isinstance(models[0], Iterable) and not isinstance(models[0], nn.Module):
        networks, sample = list(models[0]), models[1]
    elif (
        len(models) == 2
        and isinstance(models[0], (nn.ModuleList, nn.Sequential))
        and not isinstance(models[1], nn.Module)
    ):
        raise InputError(
            "`compile_zip` needs at least two models; found one. Pass `a, b, sample_input` or a list of models."
        )
    elif len(models) == 3 and not isinstance(models[2], nn.Module):
        networks, sample = list(models[:2]), models[2]
    elif any(isinstance(model, nn.Module) for model in models[2:]):
        raise InputError(
            "`compile_zip(a, b, sample_input)` takes two models; the third argument is a module too. "
            "Pass three or more models as a list: `compile_zip([a, b, c], sample_input)`."
        )
    elif len(models) == 2 and all(isinstance(model, nn.Module) for model in models):
        raise InputError(
            "`sample_input` must be a tensor, or a tuple or dict of tensors; found two modules and nothing else. "
            "Pass one batch of what the models take as third argument."
        )
    else:
        raise InputError(
            "`compile_zip` takes `a, b, sample_input` or `[a, b, c], sample_input`; "
            f"found {len(models)} positional arguments."
        )
    if isinstance(sample, nn.Module):
        raise InputError(
            "`sample_input` must be a tensor, or a tuple or dict of tensors; found a module. Pass the models as a list."
        )
    if len(networks) < 2:
        raise InputError(f"`compile_zip` needs at least two models; found {len(networks)}.")
    return [check_model(model, f"model {k}") for k, model in enumerate(networks)], as_call(sample)


def _no_barriers(labellings: Sequence[Labelling]) -> None:
    reasons = dict.fromkeys(f"model {k}: {b.reason}" for k, one in enumerate(labellings) for b in one.barriers)
    if reasons:
        raise BarrierError(
            f"`strict=True` allows no barrier; {len(reasons)} found:\n  " + "\n  ".join(reasons)
            + "\nPass `rules=fxzip.RULES | {...}` with a rule for each, or `strict=False` to stop sharing there."
        )  # fmt: skip
