"""Positions of axes and what ties them: atoms, united in bulk, frozen with a reason.

Every position of every axis is an *atom*, an integer. Equations unite atoms (a channel's producers
and consumers become one set) or freeze them. Unions are only noted while a model is read and solved
at the end, all at once, so that reading costs a few array operations an equation.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

LIVE, FREE, FROZEN = 0, 1, 2
DATA, CONSTANT = -2, -1
"""Where a value comes from, where it is not the index of a leaf."""
GROWS = "an axis of size one that is broadcast"


class Value(NamedTuple):
    """An array of the model, abstractly.

    Attributes:
      axes: the atoms of each axis.
      zero: for each axis, whether the array is zero where a removed channel is zeroed.
      const: the number that the array holds everywhere, where that is known.
      source: index of the only leaf it is computed from, else ``DATA`` or ``CONSTANT``.
    """

    axes: tuple[np.ndarray, ...]
    zero: tuple[bool, ...]
    const: Any = None
    source: int = DATA

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes at full size."""
        return tuple(map(len, self.axes))

    def is_zero(self, axis: int) -> bool:
        """Whether removed positions of ``axis`` hold zeros."""
        return self.zero[axis] or bool(self.const == 0)


class Product(NamedTuple):
    """A matmul or convolution: ``scale`` times the sizes of ``axes`` operations, for a leaf."""

    scale: int
    axes: tuple[np.ndarray, ...]
    leaf: int


class Solution(NamedTuple):
    """The root of every atom; for every root the index of the reason why it is frozen or inexact.

    The index is -1 where it is not.
    """

    roots: np.ndarray
    frozen: np.ndarray
    inexact: np.ndarray
    reasons: list[str]

    def why(self, notes: np.ndarray, root: int) -> str:
        """The reason that ``notes`` (frozen or inexact) has for ``root``, or ""."""
        return self.reasons[notes[root]] if notes[root] >= 0 else ""


class Atoms:
    """The atoms of one reading: makes, unites, freezes and spoils them."""

    def __init__(self) -> None:
        self.products: list[Product] = []
        self.repeat = 1
        self._size = 0
        self._kind = np.zeros(1024, np.int8)
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self._frozen: list[tuple[np.ndarray, str]] = []
        self._inexact: list[tuple[np.ndarray, str]] = []

    def fresh(self, n: int, kind: int = LIVE, reason: str = "") -> np.ndarray:
        """``n`` new atoms; frozen ones need a reason."""
        start, self._size = self._size, self._size + n
        while self._size > len(self._kind):
            self._kind = np.concatenate([self._kind, np.zeros_like(self._kind)])
        atoms = np.arange(start, self._size)
        if kind:
            self._kind[start : self._size] = kind
        if kind == FROZEN and n:
            self._frozen.append((atoms, reason))
        return atoms

    def value(
        self, shape: Iterable[int], kind: int = LIVE, reason: str = "", **fields: Any
    ) -> Value:
        """A value whose axes are all new."""
        axes = tuple(self.fresh(n, kind, reason) for n in shape)
        return Value(axes, **({"zero": (False,) * len(axes)} | fields))

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Position by position, the two are one."""
        if a is not b:
            self._pairs.append((a, b))

    def freeze(self, atoms: np.ndarray, reason: str) -> None:
        """These stay, whatever is asked."""
        if not self.is_frozen(atoms):
            self._kind[atoms] = FROZEN
            self._frozen.append((atoms, reason))

    def spoil(self, atoms: np.ndarray, reason: str) -> None:
        """Removing these is not the same as zeroing them."""
        if not self.is_frozen(atoms):
            self._inexact.append((atoms, reason))

    def is_frozen(self, atoms: np.ndarray) -> bool:
        """Whether all of them are known to be frozen by now."""
        return bool((self._kind[atoms] == FROZEN).all())

    def rank(self, atoms: np.ndarray) -> int:
        """How much an axis is worth following: 2 frozen, 1 live, 0 free (new by broadcasting)."""
        return (1, 0, 2)[self._kind[atoms[0]]] if len(atoms) else 2

    def join(self, axes: Sequence[np.ndarray]) -> np.ndarray:
        """Unite axes; returns the one worth following."""
        best = axes[0]
        if len(axes) > 1:
            best = max(axes, key=self.rank)
            for other in axes:
                self.unite(best, other)
        return best

    def solve(self) -> Solution:
        """Union-find over everything noted: hook roots to smaller ones, flatten, repeat."""
        parent = np.arange(self._size)
        if self._pairs:
            left = np.concatenate([a for a, _ in self._pairs])
            right = np.concatenate([b for _, b in self._pairs])
            while left.size:
                low, high = np.minimum(left, right), np.maximum(left, right)
                np.minimum.at(parent, high, low)
                while True:
                    above = parent[parent]
                    if np.array_equal(above, parent):
                        break
                    parent = above
                left, right = parent[left], parent[right]
                apart = left != right
                left, right = left[apart], right[apart]
        reasons: dict[str, int] = {}
        frozen = _first_notes(parent, self._frozen, reasons)
        inexact = _first_notes(parent, self._inexact, reasons)
        return Solution(parent, frozen, inexact, list(reasons))


def _first_notes(
    parent: np.ndarray, notes: list[tuple[np.ndarray, str]], reasons: dict[str, int]
) -> np.ndarray:
    """The index of the first reason noted for each root, -1 where there is none."""
    first = np.full(len(parent), -1, np.int32)
    if notes:
        atoms = np.concatenate([atoms for atoms, _ in reversed(notes)])
        index = [reasons.setdefault(reason, len(reasons)) for _, reason in notes][::-1]
        first[parent[atoms]] = np.repeat(index, [len(atoms) for atoms, _ in reversed(notes)])
    return first


Rule = Callable[[Atoms, core.JaxprEqn, Sequence[Value]], Sequence[Value]]
"""What an equation ties together, and what comes out of it."""


def source_of(values: Sequence[Value]) -> int:
    """The one leaf that the values come from, else ``DATA``, or ``CONSTANT`` for none at all."""
    sources = {value.source for value in values} - {CONSTANT}
    return CONSTANT if not sources else sources.pop() if len(sources) == 1 else DATA


def literal(number: Any) -> Value:
    """A number in the text of the program."""
    return Value((), (), number, CONSTANT)


def freeze_all(atoms: Atoms, values: Sequence[Value], reason: str) -> None:
    """Nothing that these values carry may go."""
    for value in values:
        for axis in value.axes:
            atoms.freeze(axis, reason)


def unknown(atoms: Atoms, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Whatever the equation does, it sees everything at full size."""
    reason = f"unknown primitive {eqn.primitive.name}"
    freeze_all(atoms, ins, reason)
    return [
        atoms.value(shape_of(var), FROZEN, reason, source=source_of(ins)) for var in eqn.outvars
    ]


def shape_of(var: Any) -> tuple[int, ...]:
    """The full shape of a variable; empty for what is no array."""
    return tuple(getattr(var.aval, "shape", ()))


def opaque(reason: str) -> Rule:
    """A rule that freezes everything, for a reason."""

    def rule(atoms, eqn, ins):
        freeze_all(atoms, ins, reason)
        return [
            atoms.value(shape_of(var), FROZEN, reason, source=source_of(ins)) for var in eqn.outvars
        ]

    return rule


def take_axes(value: Value, order: Sequence[int]) -> Value:
    """The value with these axes, in this order."""
    axes, zero = tuple(value.axes[a] for a in order), tuple(value.zero[a] for a in order)
    return Value(axes, zero, value.const, value.source)
