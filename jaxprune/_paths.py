"""Rules by path: which pattern governs a leaf, and what a rule is called."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxprune import _tree
from jaxprune._typing import PyTree


def match(tree: PyTree, rules: Mapping[str, Any]) -> dict[str, str | None]:
    """Which pattern governs each governed path of ``tree``; ``None`` where none matches.

    Args:
      tree: ``None`` where not governed.
      rules: by pattern, the first that matches wins; ``None`` asks for nothing, and may do so
        where nothing is governed.

    Raises:
      ValueError: for a pattern that is no regular expression or can never apply.
    """
    compiled = {}
    for pattern in rules:
        try:
            compiled[pattern] = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    leaves = _tree.leaves_with_paths(tree)
    paths = [path for path, leaf in leaves if leaf is not None]
    others = [path for path, leaf in leaves if leaf is None]
    taken = {
        path: next((p for p, found in compiled.items() if found.search(path)), None)
        for path in paths
    }
    for pattern, found in compiled.items():
        if pattern in taken.values():
            continue
        hits = [path for path in paths if found.search(path)]
        idle = [path for path in others if found.search(path)]
        if hits:
            by = ", ".join(sorted({repr(taken[path]) for path in hits}))
            raise ValueError(
                f"rule {pattern!r} can never apply: earlier rules ({by}) take all that it matches, "
                f"{', '.join(hits)}; put it before them, or drop it"
            )
        if idle and rules[pattern] is None:
            continue
        note = f"; it matches {', '.join(idle)}, not governed by prunable" if idle else ""
        raise ValueError(
            f"rule {pattern!r} matches none of the governed leaves {', '.join(paths)}{note}; "
            "mend the pattern, or drop the rule"
        )
    return taken


def rules_of(function: Any, tree: PyTree) -> dict[str, Any]:
    """The rule of ``function`` for each governed path; itself where it has no rules."""
    words = getattr(function, "keywords", {})
    rules = words.get("rules", words.get("units"))
    if not isinstance(rules, Mapping):
        return {path: function for path, leaf in _tree.leaves_with_paths(tree) if leaf is not None}
    taken = match(tree, rules)
    return {
        path: words.get("default") if pattern is None else rules[pattern]
        for path, pattern in taken.items()
    }


def name(rule: Any) -> str:
    """A rule in words."""
    if rule is None:
        return "untouched"
    if isinstance(rule, partial):
        given = ", ".join([*map(str, rule.args), *(f"{k}={v}" for k, v in rule.keywords.items())])
        return f"{name(rule.func)}({given})"
    return str(getattr(rule, "__name__", rule))
