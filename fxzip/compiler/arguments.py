"""Which of the positional arguments are models, and which is the sample input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..calibration.sources import PerModel
from ..errors import InputError
from ..tracing import check_model, check_placement
from ..tracing.calls import Call, JointCall, as_call, batch_size


@dataclass(frozen=True)
class Given:
    """What an entry point was given to zip.

    Attributes:
        networks: the models.
        sample: the sample input as it was given.
        call: the same as a call.
        tasks: names of the tasks; empty where they have none.
    """

    networks: tuple[nn.Module, ...]
    sample: Any
    call: Call
    tasks: tuple[str, ...]

    @classmethod
    def of(cls, arguments: Sequence[Any], name: str = "compile_zip", *, own_inputs: bool = True) -> Given:
        """Sort out the positional arguments; `name` and `own_inputs` as in `models_and_sample`.

        Raises:
            InputError: they are not models and a sample input.
        """
        tasks = tasks_of(arguments[0] if arguments else None)
        networks, call = models_and_sample(arguments, name, own_inputs=own_inputs)
        return cls(tuple(networks), arguments[-1], call, tasks)

    @classmethod
    def one(cls, model: Any, sample: Any, name: str) -> Given:
        """One model; `name` is who asks.

        Raises:
            InputError: it is no eager module, or the sample no input.
        """
        if isinstance(sample, (nn.Module, PerModel)):
            raise InputError(
                f"`{name}` takes one model and `sample_input`, a tensor, or a tuple or dict of tensors; found a "
                f"{'module' if isinstance(sample, nn.Module) else '`PerModel`'} as `sample_input`."
            )
        checked = check_model(model, "model")
        check_placement([checked])
        return cls((checked,), sample, as_call(sample), ())


def models_and_sample(
    arguments: Sequence[Any], name: str = "compile_zip", *, own_inputs: bool = False
) -> tuple[list[nn.Module], Call]:
    """Split `a, b, sample_input` or `[a, b, ...], sample_input`. At least two models, on one device, of one dtype.

    `own_inputs`: a `PerModel` of sample inputs may be given; it becomes a `JointCall`.

    >>> import torch
    >>> networks, call = models_and_sample([nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(1, 2)])
    >>> len(networks), call.args[0].shape
    (2, torch.Size([1, 2]))

    Raises:
        InputError: anything else; `name` is the function that the message speaks of.
    """
    networks, sample = _split(arguments, name)
    if isinstance(sample, nn.Module):
        raise InputError(
            "`sample_input` must be a tensor, or a tuple or dict of tensors; found a module. Pass the models as a list."
        )
    networks = check_models(networks, name)
    if not isinstance(sample, PerModel):
        return networks, as_call(sample)
    if not own_inputs:
        raise InputError(
            f"`{name}` needs one sample input that all models take; found a `PerModel`. Models with inputs of their "
            "own go into `compile_zip(..., start=...)` and `side_by_side`."
        )
    return networks, _joint(sample, len(networks))


def _joint(samples: PerModel, models: int) -> JointCall:
    if len(samples) != models:
        raise InputError(
            f"`sample_input` as a `PerModel` must hold an input for each of the {models} models; found {len(samples)}."
        )
    call = JointCall.of(as_call(sample) for sample in samples)
    if len(sizes := {batch_size(part) for part in call.parts}) > 1:
        raise InputError(
            "`sample_input` as a `PerModel` must hold inputs that belong together, as many for each model; found "
            f"batches of {' and '.join(str(n) for n in sorted(n or 0 for n in sizes))}."
        )
    return call


def check_models(networks: Sequence[Any], name: str) -> list[nn.Module]:
    """At least two models, eager, not quantised, on one device, of one dtype; `name` is who asks.

    >>> len(check_models([nn.Linear(2, 2), nn.Linear(2, 3)], "soup"))
    2

    Raises:
        InputError: they are not.
    """
    if len(networks) < 2:
        raise InputError(f"`{name}` needs at least two models; found {len(networks)}.")
    checked = [check_model(model, f"model {k}") for k, model in enumerate(networks)]
    check_placement(checked)
    return checked


def _split(models: Sequence[Any], name: str) -> tuple[list[Any], Any]:
    if len(models) == 2 and isinstance(models[0], (Mapping, nn.ModuleDict)):
        return list(models[0].values()), models[1]
    if len(models) == 2 and isinstance(models[0], Iterable) and not isinstance(models[0], nn.Module):
        return list(models[0]), models[1]
    if (
        len(models) == 2
        and isinstance(models[0], (nn.ModuleList, nn.Sequential))
        and not isinstance(models[1], nn.Module)
    ):
        raise InputError(
            f"`{name}` needs at least two models; found one. Pass `a, b, sample_input` or a list of models."
        )
    if len(models) == 3 and not isinstance(models[2], nn.Module):
        if not isinstance(models[0], nn.Module) and isinstance(models[0], (Mapping, Iterable)):
            raise InputError(
                f"`{name}([a, b, ...], sample_input)` takes two positional arguments; found a third. Calibration data "
                "goes by keyword, `data=...`."
            )
        return list(models[:2]), models[2]
    if any(isinstance(model, nn.Module) for model in models[2:]):
        raise InputError(
            f"`{name}(a, b, sample_input)` takes two models; the third argument is a module too. "
            f"Pass three or more models as a list: `{name}([a, b, c], sample_input)`."
        )
    if len(models) == 2 and all(isinstance(model, nn.Module) for model in models):
        raise InputError(
            "`sample_input` must be a tensor, or a tuple or dict of tensors; found two modules and nothing else. "
            "Pass one batch of what the models take as third argument."
        )
    if len(models) == 4 and all(isinstance(model, nn.Module) for model in models[:2]):
        raise InputError(
            f"`{name}(a, b, sample_input)` takes three positional arguments; found a fourth. Calibration data goes by "
            "keyword, `data=...`."
        )
    if len(models) == 1 and not isinstance(models[0], nn.Module):
        raise InputError(
            f"`{name}` needs one batch of what the models take, to trace them: `{name}([a, b, ...], sample_input)`."
        )
    raise InputError(
        f"`{name}` takes `a, b, sample_input` or `[a, b, c], sample_input`; found {len(models)} positional arguments."
    )


def tasks_of(models: Any) -> tuple[str, ...]:
    """The names of the tasks, where the models are given by name; else none.

    >>> tasks_of({"pets": nn.Linear(2, 2), "birds": nn.Linear(2, 3)}), tasks_of([nn.Linear(2, 2)])
    (('pets', 'birds'), ())

    Raises:
        InputError: a name is no string, or is empty.
    """
    if not isinstance(models, (Mapping, nn.ModuleDict)):
        return ()
    wrong = [name for name in models if not (isinstance(name, str) and name)]
    if wrong:
        raise InputError(f"Names of tasks must be strings that are not empty; found {wrong[0]!r}.")
    return tuple(models)


def data_of(data: Any, tasks: Sequence[str]) -> Any:
    """Calibration data in the order of the models, where they are given by the names of the tasks.

    >>> list(data_of({"birds": [1], "pets": [2]}, ["pets", "birds"]))
    [[2], [1]]

    Raises:
        InputError: the names are not those of the tasks.
    """
    if not tasks or not isinstance(data, Mapping):
        return data
    if set(data) != set(tasks):
        raise InputError(
            f"`data` by name must have the names of the models, {', '.join(map(repr, tasks))}; found "
            f"{', '.join(map(repr, data))}."
        )
    return PerModel(*(data[task] for task in tasks))
