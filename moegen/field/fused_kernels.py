"""Triton kernels of a fused MoE baseline, as serving engines have them: choices sorted into padded blocks of one expert, a
gathering product used twice, an activation, a sum over k. Rows of an expert are in no fixed order.

What differs from batch to batch is not specialised on, so that nothing is compiled anew for another number of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["padding", "slot_count", "experts"])
def begin_kernel(slots, counts, padding, slot_count, experts, BLOCK: tl.constexpr):
    """Fills slots with what means padding and clears the counts."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(slots + at, at * 0 + padding, mask=at < slot_count)
    tl.store(counts + at, at * 0, mask=at < experts)


@triton.jit(do_not_specialize=["choices"])
def count_kernel(ids, counts, choices, BLOCK: tl.constexpr):
    """Rows of each expert."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < choices
    expert = tl.load(ids + at, mask=there, other=0)
    tl.atomic_add(counts + expert, at * 0 + 1, mask=there, sem="relaxed")


@triton.jit(do_not_specialize=["experts", "blocks"])
def place_kernel(counts, cursors, block_expert, used, experts, blocks, M: tl.constexpr, EXPERTS: tl.constexpr, STEP: tl.constexpr):
    """Where each expert's blocks of M rows begin, and which expert each block has; every program places STEP blocks."""
    e = tl.arange(0, EXPERTS)
    own = (tl.load(counts + e, mask=e < experts, other=0) + M - 1) // M
    ends = tl.cumsum(own, 0)
    if tl.program_id(0) == 0:
        tl.store(cursors + e, (ends - own) * M, mask=e < experts)
        tl.store(used, tl.sum(own, 0))
    block = tl.program_id(0) * STEP + tl.arange(0, STEP)
    before = (ends[None, :] <= block[:, None]) & (e[None, :] < experts)
    tl.store(block_expert + block, tl.sum(before.to(tl.int32), 1), mask=block < blocks)


@triton.jit(do_not_specialize=["choices"])
def scatter_kernel(ids, cursors, slots, choices, BLOCK: tl.constexpr):
    """Choices into the blocks of their experts."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < choices
    expert = tl.load(ids + at, mask=there, other=0)
    place = tl.atomic_add(cursors + expert, at * 0 + 1, mask=there, sem="relaxed")
    tl.store(slots + place, at, mask=there)


@triton.jit(do_not_specialize=["blocks", "choices"])
def product_kernel(
    a, w, bias, out, factors, ids, slots, block_expert, used,
    blocks, n, k, choices, a_stride, w_expert_stride, w_stride,
    SHARE: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, SORTED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out[slot, :n] = a[slot // SHARE, :k] @ w[expert].T, for the slots of each block; weighted, biased where asked.

    Unsorted, every choice is a block of its own. Blocks are walked in groups of GROUP, so that they find the weights in the cache.
    """
    total = blocks
    if SORTED:
        total = tl.load(used)
    columns = tl.cdiv(n, N)
    program = tl.program_id(0)
    if program >= total * columns:
        return
    group = program // (GROUP * columns)
    height = tl.minimum(total - group * GROUP, GROUP)
    block = group * GROUP + (program % (GROUP * columns)) % height
    column = (program % (GROUP * columns)) // height

    m = tl.arange(0, M)
    if SORTED:
        slot = tl.load(slots + block * M + m)
        expert = tl.load(block_expert + block).to(tl.int64)
    else:
        slot = tl.where(m == 0, block, choices)
        expert = tl.load(ids + block).to(tl.int64)
    there = slot < choices
    row = tl.where(there, slot // SHARE, 0).to(tl.int64)
    at_n = column * N + tl.arange(0, N)
    safe_n = tl.where(at_n < n, at_n, 0).to(tl.int64)
    at_k = tl.arange(0, K)
    a_at = a + row[:, None] * a_stride + at_k[None, :]
    w_at = w + expert * w_expert_stride + safe_n[None, :] * w_stride + at_k[:, None]
    total_mn = tl.zeros((M, N), tl.float32)
    for step in range(0, tl.cdiv(k, K)):
        if EVEN:
            left = tl.load(a_at, mask=there[:, None], other=0.0)
            right = tl.load(w_at)
        else:
            inside = at_k < k - step * K
            left = tl.load(a_at, mask=there[:, None] & inside[None, :], other=0.0)
            right = tl.load(w_at, mask=inside[:, None], other=0.0)
        total_mn = tl.dot(left, right, total_mn, input_precision="ieee")
        a_at += K
        w_at += K
    if BIASED:
        total_mn += tl.load(bias + expert * n + safe_n)[None, :].to(tl.float32)
    if WEIGHTED:
        total_mn *= tl.load(factors + slot, mask=there, other=0.0)[:, None]
    to = out + slot[:, None].to(tl.int64) * n + at_n[None, :]
    tl.store(to, total_mn.to(out.dtype.element_ty), mask=there[:, None] & (at_n < n)[None, :])


@triton.jit
def activate_kernel(h, out, n, alpha, limit, CLAMPED: tl.constexpr, BLOCK: tl.constexpr):
    """out[row, n] = silu(gate) * up of h [row, 2n], or the clamped form of it."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(h + row * 2 * n + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(h + row * 2 * n + n + at, mask=at < n, other=0.0).to(tl.float32)
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        made = gate / (1.0 + tl.exp(-gate * alpha)) * up
    else:
        made = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * n + at, made.to(out.dtype.element_ty), mask=at < n)


@triton.jit
def sum_kernel(y, out, n, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """out[t, n] = sum over k of y[t, k, n]."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(TOP_K):
        total += tl.load(y + (token * TOP_K + slot) * n + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out + token * n + at, total.to(out.dtype.element_ty), mask=at < n)
