"""Reading a model's jaxpr: trace a function over a parameter tree, open the calls inside it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core

from jaxprune import _checks, _tree
from jaxprune._typing import Params


class Traced(NamedTuple):
    """A model as equations: the first ``len(paths)`` inputs of ``jaxpr`` are the leaves of params.

    ``out_tree`` is the structure of the outputs.
    """

    jaxpr: core.ClosedJaxpr
    paths: tuple[str, ...]
    out_tree: Any


def trace(apply: Callable[..., Any], params: Params, *args: Any) -> Traced:
    """The jaxpr of ``apply(params, *args)`` at abstract shapes; no arithmetic happens."""
    _checks.check_apply(apply)
    abstract = jax.tree.map(jax.typeof, (params, args))
    jaxpr, shape = jax.make_jaxpr(apply, return_shape=True)(abstract[0], *abstract[1])
    paths = [path for path, leaf in _tree.leaves_with_paths(params) if leaf is not None]
    return Traced(jaxpr, tuple(paths), jax.tree.structure(shape))


def called(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The jaxpr that a plain call (jit, remat, custom derivative) runs on exactly its inputs.

    ``None`` for every other primitive, loops and branches among them.
    """
    if eqn.primitive.name in ("scan", "while", "cond"):
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(name)
        if inner is not None and len(closed(inner).jaxpr.invars) == len(eqn.invars):
            return closed(inner)
    return None


def closed(jaxpr: Any) -> core.ClosedJaxpr:
    """A jaxpr inside an equation, with its constants where it has any."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def scan_parts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """How many inputs of a ``scan`` are the same at every turn, and how many are carried.

    What is scanned has one axis more outside than inside.
    """
    inner = closed(eqn.params["jaxpr"]).jaxpr

    def scanned(outside, inside):
        return sum(a.aval.ndim != b.aval.ndim for a, b in zip(outside, inside, strict=True))

    carried = len(eqn.outvars) - scanned(eqn.outvars, inner.outvars)
    return len(eqn.invars) - scanned(eqn.invars, inner.invars) - carried, carried
