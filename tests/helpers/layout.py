"""The packed layout in numpy, from its description in csrc/core/format.h, one lane at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from helpers.reference import F32, NF4, Format, fma, group_edges, unstore

LANES, LINE, PAD = 16, 64, 8


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def layout_id(form: Format, scale_code: int, symmetric: bool, device: int = 1, version: int = 1):
    return version | device << 8 | scale_code << 12 | (not symmetric) << 16 | form.code << 20


def pack(
    data: np.ndarray, scale: np.ndarray, scale_bytes: np.ndarray, zero: np.ndarray | None,
    form: Format, cols: int, group_size: int,
) -> np.ndarray:  # fmt: skip
    """data as stored [N, ...]; scale float32 [N, G]; scale_bytes its bytes as stored [N, G, b]."""
    n = len(data)
    codes = unstore(data, form, cols)
    edges = group_edges(cols, group_size)
    padded = [up(end - begin, PAD) for begin, end in edges]
    starts = np.cumsum([0, *padded])
    width = scale_bytes.shape[-1]

    at_scales = up(int(starts[-1]) * LANES * form.bits // 8, LINE)
    at_zeros = up(at_scales + len(edges) * LANES * width, LINE)
    at_sums = up(at_zeros + (0 if zero is None else len(edges) * LANES), LINE)
    at_bias = up(at_sums + (len(edges) * LANES * 4 if form.bits == 8 else 0), LINE)
    total = up(at_bias + (0 if form is NF4 else LANES * 4), LINE)

    packed = np.zeros((up(n, LANES) // LANES, total), np.uint8)
    for row in range(n):
        block, lane = packed[row // LANES], row % LANES
        column_sum = np.zeros((), F32)
        for g, (begin, end) in enumerate(edges):
            for i, code in enumerate(codes[row, begin:end]):
                kp = int(starts[g]) + i
                if form.bits == 8:
                    block[kp // 4 * LINE + lane * 4 + kp % 4] = code & 0xFF
                else:
                    block[kp // 8 * LINE + lane * 4 + kp % 4] |= code << (4 if kp % 8 >= 4 else 0)
            at = g * LANES + lane
            block[at_scales + at * width :][:width] = scale_bytes[row, g]
            if zero is not None:
                block[at_zeros + at] = zero[row, g] & 0xFF
            if form.bits == 8:
                code_sum = np.array([codes[row, begin:end].sum()], np.int32)
                block[at_sums + at * 4 :][:4] = code_sum.view(np.uint8)
            middle = form.offset if zero is None else int(zero[row, g])
            exact = int(codes[row, begin:end].sum()) - middle * (end - begin)
            column_sum = fma(F32(exact), scale[row, g], column_sum)
        if form is not NF4:
            block[at_bias + lane * 4 :][:4] = np.array([column_sum], F32).view(np.uint8)
    return packed


def pack_cuda(w: Any) -> tuple[torch.Tensor, int]:
    """A helpers.data.Weight in the CUDA layout, and its layout id."""
    form, symmetric = w.kind.form, w.kind.symmetric
    edges = group_edges(w.k, w.group_size)
    padded = [up(end - begin, 32) for begin, end in edges]
    starts = np.cumsum([0, *padded])
    total = up(int(starts[-1]), 32 if form.bits == 8 else 64)
    blocks = up(w.n, LANES) // LANES
    codes = np.zeros((blocks * LANES, total), np.int64)
    codes[:, :] = form.offset
    for g, (begin, end) in enumerate(edges):
        at = int(starts[g])
        codes[: w.n, at : at + padded[g]] = w.zero[:, g : g + 1]
        codes[: w.n, at : at + end - begin] = w.codes[:, begin:end]
    # [block, half, g, chunk, t, e] to the order in which threads hold them
    split = codes.reshape(blocks, 2, 8, total // 32, 4, 8)
    if form.bits == 8:
        body = split.transpose(0, 3, 2, 4, 1, 5) & 0xFF
    else:
        nibbles = split[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        words = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4)  # 4 bytes
        words = words.reshape(blocks, 2, 8, total // 64, 2, 4, 4)
        body = words.transpose(0, 3, 2, 5, 4, 1, 6)
    parts = [body.reshape(blocks, total * LANES * form.bits // 8)]

    def rows(values: np.ndarray) -> np.ndarray:  # [N, G, bytes] to [block, G * 16 * bytes]
        wide = np.zeros((blocks * LANES, *values.shape[1:]), np.uint8)
        wide[: w.n] = values
        wide = wide.reshape(blocks, LANES, *values.shape[1:]).swapaxes(1, 2)
        return wide.reshape(blocks, LANES * int(np.prod(values.shape[1:])))

    scales = w.scale_tensor.reshape(-1).view(torch.uint8).numpy()
    width = w.scale_tensor.element_size()
    parts.append(rows(scales.reshape(w.n, len(edges), width)))
    if not symmetric:
        parts.append(rows((w.zero & 0xFF).astype(np.uint8)[..., None]))
    column = np.zeros(w.n, F32)
    for g, (begin, end) in enumerate(edges):
        exact = w.codes[:, begin:end].sum(1) - w.zero[:, g] * (end - begin)
        column = fma(exact.astype(F32), w.scale[:, g], column)
    parts.append(rows(np.ascontiguousarray(column[:, None]).view(np.uint8).reshape(w.n, 1, 4)))
    lines = [np.pad(p, ((0, 0), (0, up(p.shape[1], LINE) - p.shape[1]))) for p in parts]
    packed = np.concatenate(lines, 1).astype(np.uint8)
    scale_code = [torch.float32, torch.bfloat16, torch.float16].index(w.kind.scale_dtype)
    return torch.from_numpy(packed), layout_id(form, scale_code, symmetric, device=2)
