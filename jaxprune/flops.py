"""Operations of a model, counted from its equations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxprune import _scopes, _tree
from jaxprune._typing import Params
from jaxprune.channels.groups import abstract, read_model


class Flops(NamedTuple):
    """Floating-point operations of matmuls and convolutions; prints as a table.

    Attributes:
      leaves: operations by the path of the leaf that is multiplied with.
      others: operations between values that come from no single leaf, such as attention scores.
    """

    leaves: dict[str, int]
    others: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.leaves.values()) + self.others

    def __str__(self) -> str:
        rows = [*self.leaves.items(), ("others", self.others), ("total", self.total)]
        widths = max(len(name) for name, _ in rows), max(len(f"{n:,}") for _, n in rows)
        return "\n".join(f"{name:{widths[0]}}  {n:>{widths[1]},}" for name, n in rows)

    def __repr__(self) -> str:
        return str(self)


def flops(apply: Callable[..., Any], params: Params, *args: Any) -> Flops:
    """Floating-point operations of one call: two for each multiply-add of a matmul or convolution.

    Loops under ``scan`` count every turn, ``while`` loops one turn, branches their dearest one.
    Element-wise operations are not counted: they are not what a smaller model saves.

    Args:
      apply: ``apply(params, *args)``; nothing is computed.
      params: any tree of arrays or ``jax.ShapeDtypeStruct``.
      *args: the other arguments, arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      A ``Flops``: per leaf, others, and ``total``.

    Raises:
      ValueError: if the model refuses these shapes.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.flops(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}, jnp.ones((5, 2))).leaves
      {'w': 60}
    """
    named = [(path, leaf) for path, leaf in _tree.leaves_with_paths(params) if leaf is not None]
    paths = [path for path, _ in named]
    leaves = [abstract(leaf) for _, leaf in named]
    tree, shapes = jax.tree.structure(params), jax.tree.map(abstract, args)
    atoms = read_model(apply, tree, leaves, shapes, paths, (), False).atoms
    counts: dict[str, int] = {}
    others = 0
    for product in atoms.products:
        count = _scopes.total([product])
        if product.leaf >= 0:
            path = paths[product.leaf]
            counts[path] = counts.get(path, 0) + count
        else:
            others += count
    return Flops(counts, others)
