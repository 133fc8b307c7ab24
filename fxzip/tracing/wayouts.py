"""What to do about a model that no rung of the tracing ladder reproduces."""

from __future__ import annotations


def nothing_worked(name: str, failures: list[str], hooks: tuple[str, ...], unsteady: str) -> str:
    """What is said where no rung reproduces a model, with a way out. `hooks`: paths of modules with forward hooks;
    `unsteady`: why the model itself gives something else in each call."""
    if unsteady:
        return f"`{name}` must give the same for the same input. {unsteady}"
    batch, shape = (any(f"but on {what} of" in failure for failure in failures) for what in ("a batch", "`data`"))
    must = "must be traceable at every batch size; it was at that of `sample_input` only" if batch else ""
    if shape:
        must = "must be traceable at every shape that `data` holds; it was at that of `sample_input` only"
    message = f"`{name}` {must or 'must be traceable; no way of tracing reproduces it'}. " + " ".join(failures)
    if hooks:
        places = ", ".join(f"`{path or name}`" for path in hooks[:5]) + (" ..." if len(hooks) > 5 else "")
        return (
            f"{message} Tracing does not always see forward hooks, found on {places}: move what a hook does to the "
            "output into the `forward` of its module."
        )
    if any("Cache'" in failure for failure in failures):
        return f"{message} Set `{name}.config.use_cache = False`: what is not a tensor cannot be an output."
    if any("does not require grad" in failure for failure in failures):
        return (
            f"{message} Gradients that `forward` takes (`torch.autograd.grad`) are no part of a graph: pass the "
            "network that is differentiated, and take the gradients of what the zipped network returns."
        )
    if any("`_is_all_true`" in failure for failure in failures):
        return f"{message} `torch.distributions` check values where `validate_args=True`: leave that out."
    if batch:
        return (
            f"{message} Replace Python loops and conditions over the rows of a batch by calls on all rows at once, or "
            "pass the part of the model that has none."
        )
    if shape:
        return f"{message} Give `data` the sizes of `sample_input`, or replace what Python does with sizes by tensors."
    if any("took another way than the model" in failure for failure in failures):
        return (
            f"{message} Python asks something of a value there that a trace answers otherwise than a tensor does: let "
            "the code ask for sizes, dtypes or settings instead, or pass the part of the model that asks nothing."
        )
    return (
        f"{message} Replace conditions on the content of tensors by tensor operations such as `torch.where`, or pass "
        "the traceable part of the model."
    )
