"""The packed layout in numpy, from its description in csrc/core/format.h, one lane at a time."""

from __future__ import annotations

import numpy as np

from helpers.reference import F32, INT4, NF4, Format, fma, group_edges, unstore

LANES, LINE, PAD = 16, 64, 8


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def layout_id(
    form: Format, scale_code: int, symmetric: bool, device: int = 1, version: int | None = None
) -> int:
    if version is None:
        version = 2 if form is INT4 and not symmetric else 1
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
            middle = form.middle if zero is None else int(zero[row, g])
            exact = form.values(codes[row, begin:end], middle).sum()
            column_sum = fma(F32(exact), scale[row, g], column_sum)
        if form is not NF4:
            block[at_bias + lane * 4 :][:4] = np.array([column_sum], F32).view(np.uint8)
    return packed


# ---- CUDA ----------------------------------------------------------------------------------------

CHUNK = 32  # k
NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight k the nibbles of a word hold


def cuda_place(form: Format, kp: int, lane: int) -> tuple[int, int]:
    """Byte and bit of the code of padded k `kp`."""
    chunk, e = kp // CHUNK, kp % 8
    thread = lane % 8 * 4 + kp % CHUNK // 8
    if form.bits == 8:
        return chunk * 512 + thread * 16 + lane // 8 * 8 + e, 0
    word = chunk % 2 * 2 + lane // 8
    bit = NIBBLES.index(e) * 4
    return chunk // 2 * 512 + thread * 16 + word * 4 + bit // 8, bit % 8


def pack_cuda(
    data: np.ndarray, scale: np.ndarray, scale_bytes: np.ndarray, zero: np.ndarray | None,
    form: Format, cols: int, group_size: int,
) -> np.ndarray:  # fmt: skip
    """As pack, in the layout of CUDA."""
    n = len(data)
    codes = unstore(data, form, cols)
    edges = group_edges(cols, group_size)
    starts = np.cumsum([0, *(up(end - begin, CHUNK) for begin, end in edges)])
    padded = up(int(starts[-1]), CHUNK if form.bits == 8 else 2 * CHUNK)
    width = scale_bytes.shape[-1]

    at_scales = padded * LANES * form.bits // 8
    at_zeros = up(at_scales + len(edges) * LANES * width, LINE)
    at_bias = up(at_zeros + (0 if zero is None else len(edges) * LANES), LINE)
    total = up(at_bias + (0 if form is NF4 else LANES * 4), LINE)

    packed = np.zeros((up(n, LANES) // LANES, total), np.uint8)
    for row in range(up(n, LANES)):
        block, lane, exists = packed[row // LANES], row % LANES, row < n
        # What fills up stands for 0: also outputs that do not exist, whose zero points are 0.
        fill = 7 if form is NF4 else form.offset if zero is None else 0
        line = np.full(padded, fill)
        column_sum = np.zeros((), F32)
        for g, (begin, end) in enumerate(edges):
            if not exists:
                continue
            middle = form.middle if zero is None else int(zero[row, g])
            start = int(starts[g])
            line[start:] = fill if zero is None else (middle + form.steps // 2) // form.steps
            line[start : start + end - begin] = codes[row, begin:end]
            at = g * LANES + lane
            block[at_scales + at * width :][:width] = scale_bytes[row, g]
            if zero is not None:
                block[at_zeros + at] = zero[row, g] & 0xFF
            exact = form.values(codes[row, begin:end], middle).sum()
            column_sum = fma(F32(exact), scale[row, g], column_sum)
        for kp, code in enumerate(line):
            byte, bit = cuda_place(form, kp, lane)
            block[byte] |= (int(code) & (1 << form.bits) - 1) << bit
        if form is not NF4:
            block[at_bias + lane * 4 :][:4] = np.array([column_sum], F32).view(np.uint8)
    return packed
