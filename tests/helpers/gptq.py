"""A literal, slow version of GPTQ in float64."""

from __future__ import annotations

import numpy as np
from torch import Tensor

import qkernels as qk
from helpers import reference as ref

FORMATS = {"int8": ref.INT8, "int4": ref.INT4, "nf4": ref.NF4}


def literal(
    weight: Tensor, moments: Tensor, scheme: qk.Scheme, act_order: str, damping: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """Optimal brain quantization in a fixed order: after each column the inverse of what is left
    of the damped Hessian is computed anew. Scales are those of plain rounding."""
    form, size = FORMATS[scheme.format], scheme.group_size
    w, h = weight.double().numpy().copy(), moments.numpy().copy()
    n, k = w.shape
    h += damping * h.diagonal().mean() * np.eye(k)
    order = np.arange(k)
    if act_order != "none":
        order = np.argsort(-moments.numpy().diagonal(), kind="stable")
    permutes = act_order == "permute" and size != -1
    stored = order if permutes else np.arange(k)
    group_of = np.empty(k, int)
    for g, (a, b) in enumerate(ref.group_edges(k, size)):
        group_of[stored[a:b]] = g
    is_static = act_order == "static" or size == -1
    scales, codes = {}, np.zeros((n, k), int)

    def choose(g):
        columns = stored[slice(*ref.group_edges(k, size)[g])]
        scales[g] = ref.choose(
            w[:, columns].astype(np.float32), form, scheme.symmetric, scheme.scale_dtype
        )

    if is_static:
        for g in range(group_of.max() + 1):
            choose(g)
    for i, column in enumerate(order):
        if group_of[column] not in scales:
            choose(group_of[column])
        scale, zero = (part[:, None] for part in scales[group_of[column]])
        now = w[:, [column]].astype(np.float32)
        code = ref.encode(now, form, scheme.symmetric, scale, zero)
        codes[:, column] = code[:, 0]
        error = w[:, column] - ref.decode(code, form, scale, zero)[:, 0].astype(np.float64)
        rest = order[i:]
        inverse = np.linalg.inv(h[np.ix_(rest, rest)])
        w[:, rest] -= np.outer(error / inverse[0, 0], inverse[0])
    return codes[:, stored], stored
