"""Running full-size equations on small arrays: shapes inside equations are rewritten as needed."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core

from jaxprune import _couple_moves, _jaxpr, _scopes
from jaxprune._atoms import Atoms, Solution, Value
from jaxprune._scopes import Scope


class Cut:
    """Which positions of which axis are left."""

    def __init__(self, roots: np.ndarray, removed: np.ndarray):
        self._gone = removed[roots]
        self._known: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}

    def left(self, axis: np.ndarray) -> np.ndarray | None:
        """The positions that are left, ``None`` where all are."""
        known = self._known.get(id(axis))
        if known is None:
            gone = self._gone[axis]
            known = axis, np.flatnonzero(~gone) if gone.any() else None
            self._known[id(axis)] = known
        return known[1]

    def size(self, axis: np.ndarray) -> int:
        """How many positions are left."""
        left = self.left(axis)
        return len(axis) if left is None else len(left)

    def shape(self, value: Value) -> tuple[int, ...]:
        """The small shape."""
        return tuple(self.size(axis) for axis in value.axes)

    def touches(self, value: Value) -> bool:
        """Whether any axis lost a position."""
        return any(self.left(axis) is not None for axis in value.axes)

    def slice(self, x: Any, value: Value) -> Any:
        """A full-size array without what is gone."""
        for at, axis in enumerate(value.axes):
            left = self.left(axis)
            if left is not None:
                x = take(x, at, left)
        return x

    def gone(self, axis: np.ndarray) -> np.ndarray:
        """For each position whether it is gone."""
        return self._gone[axis]


def cut_atoms(solution: Solution, gone: np.ndarray, kept: np.ndarray) -> Cut:
    """The cut that removes the atoms ``gone`` and whatever is tied to them.

    Raises a ``ValueError`` if that is frozen, or tied to one of the atoms ``kept``.
    """
    roots = solution.roots
    removed = np.zeros(len(roots), bool)
    removed[roots[gone]] = True
    stuck = np.flatnonzero(removed & (solution.frozen >= 0))
    if len(stuck):
        raise ValueError(
            f"a removed channel cannot go: {solution.why(solution.frozen, int(stuck[0]))}; "
            "build masks and groups from this model at these argument shapes"
        )
    if removed[roots[kept]].any():
        raise ValueError(
            "a removed channel is tied to one that is kept at these argument shapes; build masks "
            "and groups from the model as it is called here"
        )
    return Cut(roots, removed)


def take(x: Any, at: int, left: np.ndarray) -> Any:
    """The positions ``left`` of one axis: a slice where they are evenly spaced, else a gather."""
    steps = np.diff(left)
    if len(left) == 0:
        return lax.slice_in_dim(x, 0, 0, axis=at)
    if len(left) == 1 or (steps[0] > 0 and (steps == steps[0]).all()):
        step = int(steps[0]) if len(left) > 1 else 1
        if len(left) == x.shape[at]:
            return x
        return lax.slice_in_dim(x, int(left[0]), int(left[-1]) + 1, step, axis=at)
    return jax.numpy.take(x, left.astype(np.int32), axis=at, mode="clip", unique_indices=True)


def run(scope: Scope, cut: Cut, ins: Sequence[Any]) -> list[Any]:
    """Evaluate a reading on small arrays."""
    jaxpr = scope.jaxpr.jaxpr
    arrays: dict[Any, Any] = dict(zip(jaxpr.invars, ins, strict=True))
    for var, const in zip(jaxpr.constvars, scope.jaxpr.consts, strict=True):
        arrays[var] = cut.slice(const, scope.values[var])

    def array_of(var):
        return var.val if isinstance(var, core.Literal) else arrays[var]

    for place, eqn in enumerate(jaxpr.eqns):
        given = [array_of(var) for var in eqn.invars]
        before = [scope.values[var] for var in eqn.invars if not isinstance(var, core.Literal)]
        after = [scope.values[var] for var in eqn.outvars]
        if not any(cut.touches(value) for value in (*before, *after)):
            outs = _as_it_is(eqn, given)
        elif place in scope.inner:
            outs = _CALLS.get(eqn.primitive.name, _call)(scope, place, eqn, cut, given)
        else:
            entering = [
                None if isinstance(var, core.Literal) else scope.values[var] for var in eqn.invars
            ]
            outs = _SMALL.get(eqn.primitive.name, _plain)(eqn, cut, given, entering, after)
        if not eqn.primitive.multiple_results and not isinstance(outs, (list, tuple)):
            outs = [outs]
        for var, value, out in zip(eqn.outvars, after, outs, strict=True):
            if np.shape(out) != cut.shape(value):
                raise RuntimeError(
                    f"{eqn.primitive.name} gave shape {np.shape(out)} where {cut.shape(value)} is "
                    "left: please report this model"
                )
            arrays[var] = out
    return [array_of(var) for var in jaxpr.outvars]


def _as_it_is(eqn: core.JaxprEqn, given: Sequence[Any]) -> Any:
    """The equation on full-size arrays; those that run a jaxpr must be unpacked by JAX itself."""
    if _scopes.runs_equations(eqn):
        fun, places = _scopes.one_equation(eqn)
        return fun(*(given[i] for i in places))
    return eqn.primitive.bind(*given, **eqn.params)


def _rebind(eqn: core.JaxprEqn, given: Sequence[Any], **changed: Any) -> Any:
    return eqn.primitive.bind(*given, **{**eqn.params, **changed})


def _plain(eqn, cut, given, before, after):
    del cut, before, after
    return _rebind(eqn, given)


def _reshape(eqn, cut, given, before, after):
    del before
    return _rebind(eqn, given, new_sizes=cut.shape(after[0]))


def _broadcast(eqn, cut, given, before, after):
    del before
    return _rebind(eqn, given, shape=cut.shape(after[0]))


def _full_size(eqn, cut, given, before, after):
    del before
    return cut.slice(_rebind(eqn, given), after[0])


def _slice(eqn, cut, given, before, after):
    starts = eqn.params["start_indices"]
    steps = eqn.params["strides"] or (1,) * len(starts)
    x = given[0]
    for at, (axis, taken) in enumerate(zip(before[0].axes, after[0].axes, strict=True)):
        from_ = starts[at] + steps[at] * _positions(cut, taken)
        x = take(x, at, _ranks(cut, axis)[from_])
    return x


def _positions(cut: Cut, axis: np.ndarray) -> np.ndarray:
    left = cut.left(axis)
    return np.arange(len(axis)) if left is None else left


def _ranks(cut: Cut, axis: np.ndarray) -> np.ndarray:
    """For each full-size position its place among those that are left."""
    return np.cumsum(~cut.gone(axis)) - 1


def _pad(eqn, cut, given, before, after):
    x, filler = given
    for at, config in enumerate(eqn.params["padding_config"]):
        axis = before[0].axes[at]
        where = _couple_moves.padded_from(len(axis), *config)[_positions(cut, after[0].axes[at])]
        real = np.flatnonzero(where >= 0)
        low = int(real[0]) if len(real) else len(where)
        high = len(where) - 1 - int(real[-1]) if len(real) else 0
        middle = where[low : len(where) - high]
        if (middle >= 0).all():
            x = take(x, at, _ranks(cut, axis)[middle])
            x = _pad_one(x, filler, at, low, high)
        else:
            n = x.shape[at]
            x = _pad_one(x, filler, at, 0, 1)
            x = take(x, at, np.where(where >= 0, _ranks(cut, axis)[where], n))
    return x


def _pad_one(x, filler, at, low, high):
    config = [(0, 0, 0)] * x.ndim
    config[at] = (low, high, 0)
    return lax.pad(x, filler, config)


def _split(eqn, cut, given, before, after):
    del before
    along = eqn.params["axis"]
    return _rebind(eqn, given, sizes=tuple(cut.shape(value)[along] for value in after))


def _convolution(eqn, cut, given, before, after):
    del before
    lhs, rhs, _ = eqn.params["dimension_numbers"]
    if eqn.params["feature_group_count"] == 1:
        return _rebind(eqn, given)
    groups = given[0].shape[lhs[1]] // given[1].shape[rhs[1]]
    if groups == 0:
        return jax.numpy.zeros(cut.shape(after[0]), eqn.outvars[0].aval.dtype)
    return _rebind(eqn, given, feature_group_count=groups)


def _gather(eqn, cut, given, before, after):
    del after
    sizes = tuple(
        cut.size(axis) if n == len(axis) else n
        for axis, n in zip(before[0].axes, eqn.params["slice_sizes"], strict=True)
    )
    return _rebind(eqn, given, slice_sizes=sizes)


def _dynamic_slice(eqn, cut, given, before, after):
    del before
    return _rebind(eqn, given, slice_sizes=cut.shape(after[0]))


_SMALL: dict[str, Callable[..., Any]] = {
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "iota": _full_size,
    "random_bits": _full_size,
    "empty": _full_size,
    "empty2": _full_size,
    "slice": _slice,
    "pad": _pad,
    "split": _split,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
}


def _call(scope, place, eqn, cut, given):
    del eqn
    return run(scope.inner[place][0], cut, given)


def _remat(scope, place, eqn, cut, given):
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    inner = scope.inner[place][0]
    return jax.checkpoint(lambda *xs: run(inner, cut, xs), **options)(*given)


def _scan(scope, place, eqn, cut, given):
    params, inner = eqn.params, scope.inner[place][0]
    fixed, carried = _jaxpr.scan_parts(eqn)

    def step(carry, x):
        outs = run(inner, cut, [*given[:fixed], *carry, *x])
        return outs[:carried], outs[carried:]

    carry, stacked = lax.scan(
        step,
        given[fixed : fixed + carried],
        given[fixed + carried :],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *stacked]


def _while(scope, place, eqn, cut, given):
    test, inner = scope.inner[place]
    tested, fixed = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    split = tested + fixed
    return lax.while_loop(
        lambda carry: run(test, cut, [*given[:tested], *carry])[0],
        lambda carry: run(inner, cut, [*given[tested:split], *carry]),
        list(given[split:]),
    )


def _branches(scope, place, eqn, cut, given):
    del eqn

    def branch(inner):
        return lambda *xs: run(inner, cut, xs)

    return lax.switch(given[0], [branch(inner) for inner in scope.inner[place]], *given[1:])


def _custom(scope, place, eqn, cut, given):
    """The same function with the same derivative, both on small arrays."""
    inner = scope.inner[place][0]
    moving = [i for i, var in enumerate(eqn.invars) if not isinstance(var, core.Literal)]
    _, places = _scopes.one_equation(eqn)
    values = [scope.values[eqn.invars[i]] for i in places]
    outs = [scope.values[var] for var in eqn.outvars]
    first = {eqn.invars[i]: at for at, i in enumerate(places)}

    def value(*xs):
        full = list(given)
        for i in moving:
            full[i] = xs[first[eqn.invars[i]]]
        return tuple(run(inner, cut, full))

    def changes(primals, moved):
        """The derivative rule, read and cut when it is asked for."""
        derived, sub, smooth = _cut_derivative(eqn, cut, values, outs)
        floats = [a for a, x in enumerate(moved) if x.dtype != jax.dtypes.float0]
        return run(derived, sub, [*primals, *(moved[a] for a in floats)]), smooth

    if eqn.primitive.name == "custom_jvp_call":
        smooth_call = jax.custom_jvp(value)

        def forward(primals, tangents):
            results, _ = changes(primals, tangents)
            y, parts = smooth_call(*primals), iter(results)
            return y, tuple(
                next(parts) if _scopes.is_float(out) else np.zeros(out.shape, jax.dtypes.float0)
                for out in y
            )

        smooth_call.defjvp(forward)
        return smooth_call(*(given[i] for i in places))

    call = jax.custom_vjp(value)

    def backward(primals, cotangents):
        results, smooth = changes(primals, cotangents)
        grads = dict(zip(smooth, results, strict=True))
        return tuple(grads.get(at) for at in range(len(places)))

    call.defvjp(lambda *xs: (call(*xs), xs), backward)
    return call(*(given[i] for i in places))


def _cut_derivative(eqn, cut, values, outs):
    """A custom derivative's reading, and what is left on its axes."""
    atoms = Atoms()
    axes: dict[int, np.ndarray] = {}
    gone = []

    def local(value):
        for axis in value.axes:
            if id(axis) not in axes:
                axes[id(axis)] = atoms.fresh(len(axis))
                gone.append(cut.gone(axis))
        return value._replace(axes=tuple(axes[id(axis)] for axis in value.axes))

    primals, results = [local(v) for v in values], [local(v) for v in outs]
    given: list[Any] = [None] * len(eqn.invars)
    for at, i in enumerate(_scopes.one_equation(eqn)[1]):
        given[i] = primals[at]
    scope, smooth = _scopes.read_derivative(atoms, eqn, given, results)
    flags = np.concatenate(gone) if gone else np.zeros(0, bool)
    first = np.arange(len(flags))
    return scope, cut_atoms(atoms.solve(), first[flags], first[~flags]), smooth


_CALLS: dict[str, Callable[..., Any]] = {
    "scan": _scan,
    "while": _while,
    "cond": _branches,
    **dict.fromkeys(_scopes.REMATS, _remat),
    **dict.fromkeys(_scopes.CUSTOM, _custom),
}
