"""Reading a whole jaxpr: rules for plain equations, recursion for calls, loops and branches."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from jaxprune import _couple_moves, _couple_sums, _jaxpr
from jaxprune._atoms import (
    CONSTANT,
    DATA,
    FREE,
    FROZEN,
    Atoms,
    Value,
    literal,
    shape_of,
    source_of,
    unknown,
)

CALLS = frozenset(("jit", "pjit", "closed_call", "core_call", "custom_lin"))
REMATS = frozenset(("checkpoint", "remat", "remat2"))
_RULES = _couple_moves.RULES | _couple_sums.RULES
CUSTOM = frozenset(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"))


class Scope(NamedTuple):
    """One reading of a jaxpr: what each variable is, and the readings inside it.

    Attributes:
      jaxpr: the equations.
      values: of every variable.
      inner: the readings of the jaxprs that an equation runs, by the equation's place.
    """

    jaxpr: core.ClosedJaxpr
    values: dict[Any, Value]
    inner: dict[int, list["Scope"]]


def read(
    atoms: Atoms, closed: core.ClosedJaxpr, ins: Sequence[Value], *, rules: bool = False
) -> tuple[Scope, list[Value]]:
    """Read a jaxpr whose inputs are known; ``rules`` also reads the custom derivatives in it."""
    jaxpr = closed.jaxpr
    values: dict[Any, Value] = dict(zip(jaxpr.invars, ins, strict=True))
    for var in jaxpr.constvars:
        values[var] = atoms.value(shape_of(var), FREE, source=CONSTANT)
    scope = Scope(closed, values, {})

    def value_of(var):
        if isinstance(var, core.Literal):
            shape = np.shape(var.val)
            return atoms.value(shape, FREE, source=CONSTANT) if shape else literal(var.val)
        return values[var]

    for place, eqn in enumerate(jaxpr.eqns):
        given = [value_of(var) for var in eqn.invars]
        outs = _read_equation(atoms, scope, place, eqn, given, rules)
        values.update(zip(eqn.outvars, outs, strict=True))
    return scope, [value_of(var) for var in jaxpr.outvars]


def one_equation(eqn: core.JaxprEqn) -> tuple[Callable[..., Any], list[int]]:
    """An equation that runs a jaxpr as a function of its variables, and their places in it."""
    places = [i for i, var in enumerate(eqn.invars) if not isinstance(var, core.Literal)]
    first = {eqn.invars[i]: i for i in reversed(places)}
    places = sorted(first.values())
    inner = next(jaxpr for value in eqn.params.values() if (jaxpr := _equations(value)))
    info = inner.debug_info._replace(
        arg_names=("",) * len(places), result_paths=("",) * len(eqn.outvars)
    )
    given: Any = [eqn.invars[i] for i in places]
    jaxpr = core.Jaxpr((), given, list(eqn.outvars), [eqn], eqn.effects, info)
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ())), places


def runs_equations(eqn: core.JaxprEqn) -> bool:
    """Whether the equation runs a jaxpr."""
    return any(_equations(value) is not None for value in eqn.params.values())


def _equations(value: Any) -> core.Jaxpr | None:
    """The jaxpr that a parameter is or holds."""
    if isinstance(value, tuple):
        return next((jaxpr for part in value if (jaxpr := _equations(part))), None)
    value = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
    return value if isinstance(value, core.Jaxpr) else None


def derivative(eqn: core.JaxprEqn) -> tuple[core.ClosedJaxpr, list[int], list[int]]:
    """The derivative rule of a custom call as equations at full size.

    Returns the jaxpr, the places of its inputs among the equation's, and among these the ones
    that can be differentiated. For ``custom_jvp`` it takes primals and tangents to tangents, for
    ``custom_vjp`` primals and cotangents to cotangents.
    """
    fun, places = one_equation(eqn)
    avals = [_abstract(eqn.invars[i].aval) for i in places]
    smooth = [at for at, aval in enumerate(avals) if is_float(aval)]
    outs = [_abstract(var.aval) for var in eqn.outvars]
    floats = [at for at, aval in enumerate(outs) if is_float(aval)]

    def partial(primals):
        def call(*moving):
            full = list(primals)
            for at, x in zip(smooth, moving, strict=True):
                full[at] = x
            results = fun(*full)
            return [results[at] for at in floats]

        return call, [primals[at] for at in smooth]

    if eqn.primitive.name == "custom_jvp_call":

        def rule(primals, changes):
            call, moving = partial(primals)
            return jax.jvp(call, tuple(moving), tuple(changes))[1]

        jaxpr = jax.make_jaxpr(rule)(avals, [avals[at] for at in smooth])
    else:

        def rule(primals, changes):
            call, moving = partial(primals)
            return jax.vjp(call, *moving)[1](list(changes))

        jaxpr = jax.make_jaxpr(rule)(avals, [outs[at] for at in floats])
    return jaxpr, places, smooth


def read_derivative(
    atoms: Atoms, eqn: core.JaxprEqn, given: Sequence[Value], outs: Sequence[Value]
) -> tuple[Scope, list[int]]:
    """Read a custom derivative: a change of a value lies on the same axes as the value.

    Also returns which of the differing inputs can be differentiated.
    """
    jaxpr, places, smooth = derivative(eqn)
    primals = [given[i] for i in places]
    moving = [primals[at]._replace(const=None) for at in smooth]
    floats = [
        out._replace(const=None)
        for var, out in zip(eqn.outvars, outs, strict=True)
        if is_float(var.aval)
    ]
    forward = eqn.primitive.name == "custom_jvp_call"
    scope, results = read(atoms, jaxpr, [*primals, *(moving if forward else floats)])
    for result, like in zip(results, floats if forward else moving, strict=True):
        for a, b in zip(result.axes, like.axes, strict=True):
            atoms.unite(a, b)
    return scope, smooth


def _abstract(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def is_float(aval: Any) -> bool:
    """Whether it can be differentiated."""
    return jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact)


def _read_equation(
    atoms: Atoms,
    scope: Scope,
    place: int,
    eqn: core.JaxprEqn,
    given: list[Value],
    rules: bool,
) -> Sequence[Value]:
    name = eqn.primitive.name
    if name in CALLS or name in REMATS or name in CUSTOM:
        inner = _jaxpr.called(eqn)
        if inner is None:
            return unknown(atoms, eqn, given)
        called, outs = read(atoms, inner, given, rules=rules)
        scope.inner[place] = [called]
        if rules and name in CUSTOM:
            products = list(atoms.products)
            read_derivative(atoms, eqn, given, outs)
            atoms.products = products
        return outs
    if name == "scan":
        return _read_scan(atoms, scope, place, eqn, given, rules)
    if name == "while":
        return _read_while(atoms, scope, place, eqn, given, rules)
    if name == "cond":
        return _read_branches(atoms, scope, place, eqn, given, rules)
    return _RULES.get(name, unknown)(atoms, eqn, given)


def _read_scan(atoms, scope, place, eqn, given, rules):
    params = eqn.params
    fixed, carried = _jaxpr.scan_parts(eqn)
    split = fixed + carried
    xs = []
    for value in given[split:]:
        atoms.freeze(value.axes[0], "a scan runs along this axis")
        xs.append(Value(value.axes[1:], value.zero[1:], value.const, value.source))
    before, products = atoms.repeat, list(atoms.products)
    atoms.repeat *= params["length"]

    def run(carry):
        atoms.products = list(products)
        inner, outs = read(
            atoms, _jaxpr.closed(params["jaxpr"]), [*given[:fixed], *carry, *xs], rules=rules
        )
        scope.inner[place] = [inner]
        return outs

    outs, carry = _settle(atoms, given[fixed:split], run, carried)
    atoms.repeat = before
    stacked = []
    for var, value in zip(eqn.outvars[carried:], outs[carried:], strict=True):
        length = atoms.fresh(shape_of(var)[0], FROZEN, "a scan runs along this axis")
        axes, zero = (length, *value.axes), (False, *value.zero)
        stacked.append(Value(axes, zero, value.const, value.source))
    return [*carry, *stacked]


def _read_while(atoms, scope, place, eqn, given, rules):
    params = eqn.params
    tested, fixed = params["cond_nconsts"], params["body_nconsts"]
    split = tested + fixed
    products = list(atoms.products)

    def run(carry):
        atoms.products = list(products)
        test, _ = read(
            atoms, _jaxpr.closed(params["cond_jaxpr"]), [*given[:tested], *carry], rules=rules
        )
        inner, outs = read(
            atoms, _jaxpr.closed(params["body_jaxpr"]), [*given[tested:split], *carry], rules=rules
        )
        scope.inner[place] = [test, inner]
        return outs

    return _settle(atoms, given[split:], run, len(given) - split)[1]


def _settle(atoms, start, run, carried):
    """Read a loop until what it assumes of its carries is what it leaves in them."""
    carry = [value._replace(const=None, source=DATA) for value in start]
    carry = [
        value._replace(zero=tuple(s.is_zero(a) for a in range(len(s.axes))))
        for value, s in zip(carry, start, strict=True)
    ]
    while True:
        outs = run(carry)
        settled = True
        for i, (old, new) in enumerate(zip(carry, outs[:carried], strict=True)):
            axes = tuple(atoms.join([a, b]) for a, b in zip(old.axes, new.axes, strict=True))
            zero = tuple(z and new.is_zero(a) for a, z in enumerate(old.zero))
            settled &= zero == old.zero
            carry[i] = old._replace(axes=axes, zero=zero)
        if settled:
            return outs, carry


def _read_branches(atoms, scope, place, eqn, given, rules):
    scopes, results, costs = [], [], []
    before = list(atoms.products)
    for branch in eqn.params["branches"]:
        atoms.products = []
        inner, outs = read(atoms, _jaxpr.closed(branch), given[1:], rules=rules)
        scopes.append(inner)
        results.append(outs)
        costs.append(atoms.products)
    atoms.products = before + max(costs, key=total)
    scope.inner[place] = scopes
    joined = []
    for outs in zip(*results, strict=True):
        axes = tuple(atoms.join([out.axes[a] for out in outs]) for a in range(len(outs[0].axes)))
        zero = tuple(all(out.is_zero(a) for out in outs) for a in range(len(axes)))
        joined.append(Value(axes, zero, None, source_of(outs)))
    return joined


def total(products: Sequence[Any]) -> int:
    """Operations of matmuls and convolutions at full size."""
    count = 0
    for product in products:
        part = product.scale
        for axis in product.axes:
            part *= len(axis)
        count += part
    return count
