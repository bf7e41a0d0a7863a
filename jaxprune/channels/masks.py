"""Scores become masks of whole channels, and masks become the channels that are gone."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _checks, _tree
from jaxprune._typing import Masks, Scores
from jaxprune.channels.groups import ChannelGroup, ChannelGroups, Cost


def mask_channels(
    scores: Scores,
    groups: ChannelGroups,
    sparsity: Any = None,
    *,
    flops: Any = None,
    reduce: Callable[..., Any] = np.mean,
    normalise: Callable[[np.ndarray], Any] | None = np.mean,
    per_cost: bool = False,
    floor: float = 1,
    multiple_of: int = 1,
    inexact: bool = False,
) -> Masks:
    r"""Masks that remove whole channels, the least important of all groups first.

    .. math:: s_c = \frac{1}{z_g} \operatorname{reduce}_{j \in c} s_j

    The scores of a channel are gathered over all its members, reduced, and divided by their
    normaliser over the group. Channels go in ascending order, over all groups together, until what
    is left is no more than was asked for; ties go to the later group and the later channel.

    Args:
      scores: floating arrays like the parameters, ``None`` where a leaf has no say. A group
        without any score stays whole.
      groups: from ``channel_groups``, perhaps fewer by ``groups.where``.
      sparsity: fraction removed of the grouped weights, those on a channel of ``groups``.
      flops: instead, fraction removed of the model's operations in matmuls and convolutions.
      reduce: ``reduce(values, axis=1)``, such as ``np.mean``, ``np.max``, ``np.sum`` or
        ``np.linalg.norm``.
      normalise: from a group's channel scores to the number that divides them, such as
        ``np.mean``, ``np.max`` or ``np.linalg.norm``; ``None`` leaves them as they are.
      per_cost: divide a channel's score by the weights (or, with ``flops``, the operations) that
        removing it alone would save.
      floor: channels that every group keeps, at least: a count, or a fraction below 1 of the
        group. With 0, groups may go whole, such as the hidden units of a residual branch.
      multiple_of: what stays of a group is a multiple of this, or all of it; channels go in
        blocks. With more than any group's size, groups go whole or not at all.
      inexact: also remove channels of groups that are not exact.

    Returns:
      Bool masks like ``scores``, for every leaf that a channel of ``groups`` has positions on.

    Raises:
      ValueError: if not exactly one target is given, scores or groups do not fit, or the target
        cannot be reached; the message says what can.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": jnp.array([[1.0, 3.0, 2.0]]), "b": jnp.ones((3, 4))}
      >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
      >>> groups = jp.channel_groups(apply, params, jnp.ones((1, 1)))
      >>> jp.mask_channels(jp.magnitude(params), groups, 0.3)["a"].tolist()
      [[False, True, True]]

    Reference:
      Fang, Ma, Song, Mi, Wang. DepGraph: Towards Any Structural Pruning, 2023.
    """
    target, what = _target(sparsity, flops)
    _check_options(groups, floor, multiple_of)
    model = groups.model
    by_path = _scores_by_path(scores, groups)
    eligible = [
        i
        for i in groups.chosen
        if not model.groups[i].frozen and (inexact or model.groups[i].exact)
    ]
    if not eligible and target > 0:
        raise ValueError(
            "none of these groups may lose a channel: they are frozen, or not exact (print them "
            "for the reasons; inexact=True admits the latter)"
        )
    alive = np.ones(int(model.offsets[-1]), bool)
    mine = np.zeros_like(alive)
    for i in eligible:
        mine[model.offsets[i] : model.offsets[i + 1]] = True
    costs = model.products if what == "flops" else _grouped(model.weights, mine)
    savings = _savings(costs, alive) if per_cost else None

    blocks: list[np.ndarray] = []
    keys: list[float] = []
    for i in eligible:
        group, start = model.groups[i], int(model.offsets[i])
        values = _channel_scores(group, by_path, reduce)
        if values is None:
            continue
        if normalise is not None:
            scale = float(normalise(values))
            values = values / scale if 0 < scale < np.inf else values
        if savings is not None:
            values = values / np.maximum(savings[start : start + group.size], 1)
        order = np.argsort(-values, kind="stable")
        keep = int(np.ceil(floor * group.size)) if floor < 1 else int(floor)
        edges = list(range(0, group.size, multiple_of))
        for edge in edges:
            if edge < keep:
                continue
            block = order[edge : edge + multiple_of]
            blocks.append(start + block)
            keys.append(float(np.mean(values[block])))
    ranked = [blocks[b] for b in np.lexsort((-np.arange(len(keys)), np.array(keys)))]

    def left(count):
        now = alive.copy()
        if count:
            now[np.concatenate(ranked[:count])] = False
        return now

    full = _spent(costs, alive)
    allowed = full - round(target * full)
    least = _spent(costs, left(len(ranked)))
    if least > allowed:
        raise ValueError(
            f"{what}={float(target):g} cannot be reached: with every channel gone that may go, "
            f"{1 - least / max(full, 1):.4f} of the {what} is; the nearest reachable target is "
            f"{np.floor((1 - least / max(full, 1)) * 1e4) / 1e4:.4f}; lower floor or multiple_of, "
            "or let more groups take part"
        )
    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _spent(costs, left(middle)) <= allowed else (middle + 1, high)
    return _masks(scores, groups, left(low))


def _target(sparsity: Any, flops: Any) -> tuple[float, str]:
    if (sparsity is None) == (flops is None):
        raise ValueError("give one target: sparsity, of the grouped weights, or flops=")
    name, value = ("sparsity", sparsity) if flops is None else ("flops", flops)
    if not _checks.is_concrete(value):
        raise TypeError(f"{name} is traced; the shapes that follow from it must be known now")
    _checks.check_sparsity(value, name)
    return float(value), name


def _check_options(groups: ChannelGroups, floor: float, multiple_of: int) -> None:
    _check_groups(groups)
    if floor < 0:
        raise ValueError(f"floor is {floor}; it is a count or a fraction of channels, 0 or more")
    if multiple_of < 1 or multiple_of != int(multiple_of):
        raise ValueError(f"multiple_of is {multiple_of}; it is a number of channels, 1 or more")


def _check_groups(groups: Any) -> None:
    if not isinstance(groups, ChannelGroups):
        raise TypeError(
            "groups must be what jp.channel_groups gives; choose among them with groups.where(...)"
        )


def _check_concrete(path: str, leaf: Any, what: str) -> None:
    if not _checks.is_concrete(leaf):
        raise TypeError(
            f"{path}: {what} is traced; the shapes that follow from it must be known now, so call "
            "this outside jit"
        )


def _scores_by_path(scores: Scores, groups: ChannelGroups) -> dict[str, Any]:
    model = groups.model
    given = dict(_tree.leaves_with_paths(scores))
    for path, leaf in zip(model.paths, model.leaves, strict=True):
        if path not in given:
            raise ValueError(
                f"{path}: the groups know this leaf and scores do not; score the same tree"
            )
        score = given[path]
        _check_concrete(path, score, "the score")
        if score is not None and np.shape(score) != leaf.shape:
            raise ValueError(
                f"{path}: scores have shape {np.shape(score)}, the grouped model {leaf.shape}; "
                "score the same parameters"
            )
    return given


def _channel_scores(
    group: ChannelGroup, scores: dict[str, Any], reduce: Callable[..., Any]
) -> np.ndarray | None:
    """One number a channel, in float64; ``None`` where no member has scores."""
    parts = []
    for member in group.members:
        score = scores[member.path]
        if score is None:
            continue
        wide = np.moveaxis(np.asarray(jax.device_get(score)).astype(np.float32), member.axis, 0)
        parts.append(wide[member.positions.ravel()].reshape(group.size, -1))
    if not parts:
        return None
    values = np.asarray(reduce(np.concatenate(parts, axis=1), axis=1), np.float64)
    if np.isnan(values).any():
        bad = int(np.flatnonzero(np.isnan(values))[0])
        raise ValueError(f"{group.name}: the score of channel {bad} is NaN; scores must be numbers")
    return values


def _grouped(weights: Sequence[Cost], mine: np.ndarray) -> list[Cost]:
    """Leaves that a channel may go from."""
    return [cost for cost in weights if any(mine[ids[ids >= 0]].any() for ids in cost.axes)]


def _spent(costs: Sequence[Cost], alive: np.ndarray) -> int:
    """What is left of all costs; exact."""
    padded = np.append(alive, True)
    known: dict[int, int] = {}
    total = 0
    for cost in costs:
        part = cost.scale
        for ids in cost.axes:
            if id(ids) not in known:
                known[id(ids)] = int(np.count_nonzero(padded[ids]))
            part *= known[id(ids)]
        total += part
    return total


def _savings(costs: Sequence[Cost], alive: np.ndarray) -> np.ndarray:
    """What the removal of each channel alone would save."""
    saved = np.zeros(len(alive) + 1)
    for cost in costs:
        full = float(cost.scale) * np.prod([float(len(ids)) for ids in cost.axes])
        for ids in cost.axes:
            np.add.at(saved, ids, full / len(ids))
    return saved[:-1]


def _masks(scores: Scores, groups: ChannelGroups, alive: np.ndarray) -> Masks:
    """Masks like ``scores`` on every leaf of the groups."""
    model = groups.model
    touched = {member.leaf for group in groups if not group.frozen for member in group.members}
    kept = axes_kept(groups, alive)
    masks = {
        model.paths[leaf]: _outer(model.leaves[leaf].shape, kept.get(leaf, {})) for leaf in touched
    }
    structure = _tree.structure(scores)
    flat = [masks.get(path) for path, _ in _tree.leaves_with_paths(scores)]
    return jax.tree.unflatten(
        structure, [None if mask is None else jnp.asarray(mask) for mask in flat]
    )


def axes_kept(groups: ChannelGroups, alive: np.ndarray) -> dict[int, dict[int, np.ndarray]]:
    """For each leaf and each axis that lost positions: which are kept."""
    model = groups.model
    kept: dict[int, dict[int, np.ndarray]] = {}
    for group, start in zip(model.groups, model.offsets, strict=False):
        here = alive[start : start + group.size]
        if group.frozen or here.all():
            continue
        for member in group.members:
            axes = kept.setdefault(member.leaf, {})
            n = model.leaves[member.leaf].shape[member.axis]
            axis = axes.setdefault(member.axis, np.ones(n, bool))
            axis[member.positions[~here].ravel()] = False
    return kept


def _outer(shape: Sequence[int], axes: dict[int, np.ndarray]) -> np.ndarray:
    mask = np.ones(shape, bool)
    for axis, kept in axes.items():
        mask &= kept.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return mask


def channels_alive(masks: Masks, groups: ChannelGroups) -> np.ndarray:
    """Which channels the masks keep.

    Raises a ``ValueError`` naming the leaf unless the masks remove whole channels and no others.
    """
    _check_groups(groups)
    model = groups.model
    given = dict(_tree.leaves_with_paths(masks))
    found: dict[int, np.ndarray] = {}
    for leaf, path in enumerate(model.paths):
        if path not in given:
            raise ValueError(
                f"{path}: the groups know this leaf and masks do not; mask the same tree"
            )
        mask = given[path]
        if mask is None:
            continue
        _check_concrete(path, mask, "the mask")
        mask = np.asarray(jax.device_get(mask))
        if mask.dtype != bool or mask.shape != model.leaves[leaf].shape:
            raise ValueError(
                f"{path}: the mask is {mask.dtype} of shape {mask.shape}, the grouped leaf has "
                f"shape {model.leaves[leaf].shape}; use the bool masks of mask_channels"
            )
        if not mask.all():
            found[leaf] = mask
    slices = {
        (leaf, axis): np.asarray(mask.any(tuple(a for a in range(mask.ndim) if a != axis)))
        for leaf, mask in found.items()
        for axis in range(mask.ndim)
    }
    alive = np.ones(int(model.offsets[-1]), bool)
    for group, start in zip(model.groups, model.offsets, strict=False):
        if group.frozen or any(m.leaf not in found for m in group.members):
            continue
        gone = np.ones(group.size, bool)
        for member in group.members:
            gone &= ~slices[member.leaf, member.axis][member.positions].any(1)
        alive[start : start + group.size] = ~gone
    kept = axes_kept(groups, alive)
    for leaf, mask in found.items():
        if not np.array_equal(mask, _outer(mask.shape, kept.get(leaf, {}))):
            raise ValueError(_explain(groups, leaf, slices, alive))
    return alive


def _explain(groups: ChannelGroups, leaf: int, slices: Any, alive: np.ndarray) -> str:
    """Why the mask of a leaf is no set of whole channels."""
    model = groups.model
    path = model.paths[leaf]
    for group, start in zip(model.groups, model.offsets, strict=False):
        for member in group.members:
            if member.leaf != leaf:
                continue
            gone = ~slices[leaf, member.axis][member.positions].any(1)
            torn = np.flatnonzero(gone & alive[start : start + group.size])
            if not len(torn):
                continue
            channel = int(torn[0])
            if group.frozen:
                return (
                    f"{path}: the mask removes position {int(member.positions[channel, 0])} of "
                    f"axis {member.axis}, which is frozen ({group.reason}); keep it"
                )
            for other in group.members:
                entry = slices.get((other.leaf, other.axis))
                if entry is None or entry[other.positions[channel]].any():
                    return (
                        f"{path}: channel {channel} of {group.name} is removed here (axis "
                        f"{member.axis}) and kept in {other.path} (axis {other.axis}); remove it "
                        "from every member, as mask_channels does"
                    )
    return (
        f"{path}: the mask does not remove whole channels of the groups; make it with "
        "mask_channels, or keep single weights"
    )
