"""Checks of what a user gives: numbers, keys, batches, and the functions of the pipeline."""

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_END = np.int32(np.iinfo(np.int32).max)  # the last step that there is
_ROUNDING = 1e-5  # of a schedule computed in float32


def is_concrete(value: Any) -> bool:
    """Whether ``value`` can be looked at now."""
    return not isinstance(value, jax.core.Tracer)


def check_sparsity(value: Any, name: str = "sparsity") -> None:
    """Raise a ``ValueError`` for a concrete value that is no fraction; traced ones are clamped.

    A ``TypeError`` is raised for what is no number at all.
    """
    if callable(value) or isinstance(value, str):
        raise TypeError(
            f"{name} is {value!r}; it is a number in [0, 1] here: of a schedule give one value, "
            "such as schedule(step)"
        )
    if is_concrete(value) and not (np.ndim(value) == 0 and 0.0 <= float(value) <= 1.0):
        raise ValueError(f"{name} is {value}; it is a fraction, a number in [0, 1]")


def check_whole(**numbers: Any) -> None:
    """Raise a ``TypeError`` for a number that is not whole, but for ``None``."""
    for name, value in numbers.items():
        try:
            operator.index(0 if value is None else value)
        except TypeError as error:
            raise TypeError(f"{name} is {value!r}; it is a whole number") from error


def check_optimizer(inner: Any, name: str = "inner") -> None:
    """Raise a ``TypeError`` unless ``inner`` is an optax transform."""
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"{name} is {inner!r}; it is an optax transform, such as optax.adam(1e-3)")


def check_apply(apply: Any) -> None:
    """Raise a ``TypeError`` for a model that cannot be called."""
    if not callable(apply):
        raise TypeError(
            f"apply is {type(apply).__name__}; it is the model, a function apply(params, *batch), "
            "and comes first"
        )


def check_min_keep(min_keep: int) -> None:
    """Raise a ``ValueError`` for a negative floor."""
    if min_keep < 0:
        raise ValueError(f"min_keep is {min_keep}; it counts weights, 0 or more")


def check_key(key: Any, *, optional: bool = False) -> None:
    """Raise a ``TypeError`` unless ``key`` is one PRNG key, typed or raw."""
    if optional and key is None:
        return
    given = repr(key)
    if isinstance(key, (jax.Array, np.ndarray)):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.shape == () if typed else key.dtype == jnp.uint32 and key.ndim == 1:
            return
        given = f"an array of type {key.dtype} and shape {key.shape}"
    raise TypeError(f"key is {given}; it is one PRNG key, such as jax.random.key(0)")


def check_batches(batches: Any) -> None:
    """Raise a ``TypeError`` for one batch where an iterable of batches belongs."""
    if hasattr(batches, "shape") or isinstance(batches, Mapping):
        what = f"one array of shape {batches.shape}" if hasattr(batches, "shape") else "one mapping"
        raise TypeError(
            f"batches is {what}; it is an iterable of batches: give [x] for the one batch x"
        )


class _Step(NamedTuple):
    """The arguments of a step of the pipeline, and functions that take them."""

    arguments: tuple[str, ...]
    examples: str


_STEPS = {
    "saliency": _Step(
        ("params", "grads"),
        "jp.magnitude or jp.taylor; what needs data, such as jp.snip, comes first: scores = "
        "jp.select(jp.snip(loss, params, batches)), then jp.mask_topk(scores, "
        "jp.allocate_global(scores, sparsity))",
    ),
    "allocate": _Step(("scores", "sparsity"), "jp.allocate_global or jp.allocate_by_path({...})"),
    "mask": _Step(
        ("scores", "keep"),
        "jp.mask_topk, jp.gradual_n_m(2, 4, axis=0), functools.partial(jp.mask_groups, axes=0) or "
        "functools.partial(jp.mask_blocks, block=16)",
    ),
    "method": _Step(
        ("params", "grams", "sparsity"), "jp.sparsegpt, jp.alps or jp.by_saliency(jp.wanda)"
    ),
    "criterion": _Step(("params", "norms"), "jp.wanda or jp.magnitude"),
    "prunable": _Step(("path", "leaf"), "jp.matching('kernel')"),
    "schedule": _Step(("step",), "jp.cubic_sparsity(0.9, 1_000)"),
    "when": _Step(("step",), "jp.every(10)"),
    "progress": _Step(("layer",), "print"),
}


def check_step(kind: str, value: Any, name: str | None = None, *keywords: str) -> None:
    """Raise a ``TypeError`` unless ``value`` can be called as a step of the pipeline is.

    Args:
      kind: which step.
      value: what a user gave for it.
      name: what the user calls it; the kind by default.
      *keywords: of the call, besides the arguments of the step.
    """
    arguments, examples = _STEPS[kind]
    name = name or kind
    if not callable(value):
        raise TypeError(f"{name} is {value!r}; it is a function, such as {examples}")
    try:
        signature = inspect.signature(value)
    except ValueError:  # a builtin may have none
        return
    try:
        signature.bind(*arguments, **dict.fromkeys(keywords))
    except TypeError as error:
        call = ", ".join([*arguments, *(f"{keyword}=" for keyword in keywords)])
        raise TypeError(
            f"{name} is {getattr(value, '__name__', value)}, which cannot be called "
            f"with ({call}): {error}; give a function such as {examples}"
        ) from error


def check_steps(**steps: Any) -> None:
    """``check_step`` for each kind."""
    for kind, value in steps.items():
        check_step(kind, value)


def as_schedule(value: Any, name: str, check: Callable[[Any, str], None]) -> Callable[[Any], Any]:
    """A number or schedule as a schedule; a number is checked now."""
    if callable(value):
        check_step("schedule", value, name)
        return value
    check(value, name)
    return lambda step: jnp.asarray(value, jnp.float32)


def as_fraction(value: Any, name: str, *, at: Any = _END) -> Callable[[Any], Any]:
    """As ``as_schedule``; of a schedule, the value at one step must not be NaN or in percent.

    By default that is the last step there is, where ramps without an end are far beyond 100. What
    they give on the way is clamped.
    """
    schedule = as_schedule(value, name, check_sparsity)
    found = _evaluated(schedule, at)
    if is_concrete(found) and (np.isnan(float(found)) or 1.0 + _ROUNDING < float(found) <= 100.0):
        when = "in the end" if at == _END else f"at step {at}"
        raise ValueError(
            f"{name} is a schedule that is {float(found):.6g} {when}; it gives fractions, numbers "
            "in [0, 1], not percent"
        )
    return schedule


def _evaluated(schedule: Callable[[Any], Any], step: Any) -> Any:
    with jax.ensure_compile_time_eval():
        return schedule(step)


class Target:
    """What a schedule comes to in the end, under a name that checkpoints compare."""

    def __init__(self, schedule: Callable[[Any], Any]):
        self.value = _evaluated(schedule, _END)
        self.name = f"{float(self.value):.6g}" if is_concrete(self.value) else "traced"

    def start(self) -> dict[str, jax.Array]:
        """The entry of a new state, such as ``{"0.9": 0.9}``, in a buffer of its own."""
        return {self.name: jnp.array(self.value, jnp.float32, copy=True)}

    def check(self, entry: dict[str, jax.Array]) -> None:
        """Raise a ``ValueError`` if a state was made for another target."""
        if list(entry) != [self.name]:
            raise ValueError(
                f"the state was made for a target of {', '.join(entry)}, this transform's is "
                f"{self.name}; restore a checkpoint of the same run, or start anew (towards a "
                "higher sparsity with masks=jp.get_masks(state, params))"
            )
