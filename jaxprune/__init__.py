"""jaxprune: scores to counts to masks to optax transforms to smaller models."""

from jaxprune._tree import kernels, matching, select
from jaxprune.allocation import (
    allocate_erk,
    allocate_global,
    allocate_lamp,
    allocate_owl,
    allocate_uniform,
)
from jaxprune.calibration import Gram, fan_in_axes, input_grams, input_norms, matmul_weights
from jaxprune.channels.groups import channel_groups
from jaxprune.channels.masks import mask_channels
from jaxprune.flops import flops
from jaxprune.layerwise.alps import alps
from jaxprune.layerwise.reconstruct import reconstruct
from jaxprune.layerwise.saliency import by_saliency
from jaxprune.layerwise.sequential import prune_layerwise
from jaxprune.layerwise.sparsegpt import sparsegpt
from jaxprune.masks import (
    apply_masks,
    density,
    mask_threshold,
    mask_topk,
    pack_masks,
    straight_through,
    unpack_masks,
)
from jaxprune.mixed import Blocks, Groups, Leaf, Weights, mask_mixed
from jaxprune.oneshot import prune
from jaxprune.plan import explain
from jaxprune.report import get_masks, summarize
from jaxprune.rules import allocate_by_path, mask_by_path, scale_by_path
from jaxprune.saliency.accumulate import accumulate, movement
from jaxprune.saliency.activations import wanda
from jaxprune.saliency.data import fisher, snip
from jaxprune.saliency.weights import gradient_magnitude, magnitude, random_saliency, taylor
from jaxprune.schedules import cubic_sparsity, every
from jaxprune.shrink import shrink, shrink_state
from jaxprune.structures.n_m import gradual_n_m, mask_n_m
from jaxprune.structures.transposable import mask_n_m_transposable
from jaxprune.structures.units import mask_blocks, mask_groups
from jaxprune.transforms.ac_dc import ac_dc
from jaxprune.transforms.evolutionary import sparse_evolutionary
from jaxprune.transforms.gradual import prune_gradually
from jaxprune.transforms.granet import granet
from jaxprune.transforms.masked import keep_params_masked
from jaxprune.transforms.regrow import prune_and_grow
from jaxprune.transforms.rewind import rewind
from jaxprune.transforms.rigl import rigl
from jaxprune.transforms.straight_through import sr_ste, train_straight_through
from jaxprune.transforms.threshold import prune_below
from jaxprune.transforms.top_kast import top_kast

__all__ = [
    "Blocks",
    "Gram",
    "Groups",
    "Leaf",
    "Weights",
    "ac_dc",
    "accumulate",
    "allocate_by_path",
    "allocate_erk",
    "allocate_global",
    "allocate_lamp",
    "allocate_owl",
    "allocate_uniform",
    "alps",
    "apply_masks",
    "by_saliency",
    "channel_groups",
    "cubic_sparsity",
    "density",
    "every",
    "explain",
    "fan_in_axes",
    "fisher",
    "flops",
    "get_masks",
    "gradient_magnitude",
    "gradual_n_m",
    "granet",
    "input_grams",
    "input_norms",
    "keep_params_masked",
    "kernels",
    "magnitude",
    "mask_blocks",
    "mask_by_path",
    "mask_channels",
    "mask_groups",
    "mask_mixed",
    "mask_n_m",
    "mask_n_m_transposable",
    "mask_threshold",
    "mask_topk",
    "matching",
    "matmul_weights",
    "movement",
    "pack_masks",
    "prune",
    "prune_and_grow",
    "prune_below",
    "prune_gradually",
    "prune_layerwise",
    "random_saliency",
    "reconstruct",
    "rewind",
    "rigl",
    "scale_by_path",
    "select",
    "shrink",
    "shrink_state",
    "snip",
    "sparse_evolutionary",
    "sparsegpt",
    "sr_ste",
    "straight_through",
    "summarize",
    "taylor",
    "top_kast",
    "train_straight_through",
    "unpack_masks",
    "wanda",
]
