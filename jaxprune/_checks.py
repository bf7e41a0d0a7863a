"""Checks of numbers that a user gives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_concrete(value: Any) -> bool:
    """Whether ``value`` can be looked at now."""
    return not isinstance(value, jax.core.Tracer)


def check_sparsity(value: Any, name: str = "sparsity") -> None:
    """Raise a ``ValueError`` for a concrete value that is no fraction; traced ones are clamped."""
    if is_concrete(value) and not (np.ndim(value) == 0 and 0.0 <= float(value) <= 1.0):
        raise ValueError(
            f"{name} is {value}; it is the fraction of weights removed, a number in [0, 1]"
        )


def check_min_keep(min_keep: int) -> None:
    """Raise a ``ValueError`` for a negative floor."""
    if min_keep < 0:
        raise ValueError(f"min_keep is {min_keep}; it counts weights, 0 or more")


def check_trigger(when: Any) -> None:
    """Raise a ``TypeError`` for a trigger that is no function."""
    if not callable(when):
        raise TypeError(f"when is {when!r}; it is a function of the step, such as jp.every(10)")


def as_schedule(value: Any, name: str, check: Callable[[Any, str], None]) -> Callable[[Any], Any]:
    """A number or schedule as a schedule; a number is checked now."""
    if callable(value):
        return value
    check(value, name)
    return lambda step: jnp.asarray(value, jnp.float32)


def check_function(value: Any, name: str, example: str) -> None:
    """Raise a ``TypeError`` for a step of the pipeline that is no function."""
    if not callable(value):
        raise TypeError(f"{name} is {value!r}; it is a function, such as {example}")


class Target:
    """What a schedule comes to in the end, under a name that checkpoints compare."""

    def __init__(self, schedule: Callable[[Any], Any]):
        with jax.ensure_compile_time_eval():
            self.value = schedule(np.int32(np.iinfo(np.int32).max))
        self.name = f"{float(self.value):.6g}" if is_concrete(self.value) else "traced"

    def start(self) -> dict[str, jax.Array]:
        """The entry of a new state, such as ``{"0.9": 0.9}``, in a buffer of its own."""
        return {self.name: jnp.array(self.value, jnp.float32, copy=True)}

    def check(self, entry: dict[str, jax.Array]) -> None:
        """Raise a ``ValueError`` if a state was made for another target."""
        if list(entry) != [self.name]:
            raise ValueError(
                f"the state was made for a target of {', '.join(entry)}, this transform's is "
                f"{self.name}; restore a checkpoint of the same run, or start anew with "
                "masks=jp.get_masks(state, params)"
            )
