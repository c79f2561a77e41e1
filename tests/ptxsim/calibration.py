"""Triton kernels of well-known shape, written for the machine's calibration and for mutation tests.

Their patterns (tiled matmul, online softmax, row reductions, sorting) are the ones that real GPUs run every day, so a
finding or a wrong number on one of them is the machine's fault, not the kernel's.
"""

import triton
import triton.language as tl


@triton.jit
def matmul(
    A, B, C, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """C = A @ B, one [BLOCK_M, BLOCK_N] tile a program, float32 accumulation."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    p_a = A + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
    p_b = B + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = k + offs_k < K
        a = tl.load(p_a, mask=(offs_m[:, None] < M) & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b = tl.load(p_b, mask=inside[:, None] & (offs_n[None, :] < N), other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(a, b, acc)
        p_a += BLOCK_K * stride_ak
        p_b += BLOCK_K * stride_bk
    p_c = C + offs_m[:, None] * stride_cm + offs_n[None, :] * stride_cn
    tl.store(p_c, acc.to(C.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))


@triton.jit
def softmax(X, Y, columns, stride, BLOCK: tl.constexpr):
    """One row a program."""
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + offs, mask=offs < columns, other=float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(Y + row * stride + offs, e / tl.sum(e, 0), mask=offs < columns)


@triton.jit
def layer_norm(X, W, B, Y, Mean, Rstd, columns, eps, BLOCK: tl.constexpr):
    """One row a program, in two passes over it."""
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(X + row * columns + offs, mask=offs < columns, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / columns
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(X + row * columns + offs, mask=offs < columns, other=0.0).to(tl.float32)
        centred = tl.where(offs < columns, x - mean, 0.0)
        squares += centred * centred
    rstd = 1 / tl.sqrt(tl.sum(squares, 0) / columns + eps)
    tl.store(Mean + row, mean)
    tl.store(Rstd + row, rstd)
    for start in range(0, columns, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < columns
        x = tl.load(X + row * columns + offs, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(W + offs, mask=inside)
        b = tl.load(B + offs, mask=inside)
        tl.store(Y + row * columns + offs, (x - mean) * rstd * w + b, mask=inside)


@triton.jit
def layer_norm_weight_gradient(X, Mean, Rstd, GradY, GradW, Lock, columns, BLOCK: tl.constexpr):
    """Each row adds its part of the weight gradient under a lock: atomics order ordinary loads and stores."""
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    inside = offs < columns
    x = tl.load(X + row * columns + offs, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(GradY + row * columns + offs, mask=inside, other=0.0).to(tl.float32)
    part = grad * (x - tl.load(Mean + row)) * tl.load(Rstd + row)
    while tl.atomic_cas(Lock, 0, 1) == 1:
        pass
    tl.store(GradW + offs, tl.load(GradW + offs, mask=inside) + part, mask=inside)
    tl.debug_barrier()
    tl.atomic_xchg(Lock, 0)


@triton.jit
def column_sums(X, Out, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Reductions across warps, joined by one atomic a column and program."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    inside = (offs_m[:, None] < rows) & (offs_n[None, :] < columns)
    x = tl.load(X + offs_m[:, None] * columns + offs_n[None, :], mask=inside, other=0.0)
    tl.atomic_add(Out + offs_n, tl.sum(x, 0), mask=offs_n < columns)


@triton.jit
def sort_rows(X, Y, Totals, BLOCK: tl.constexpr):
    """A bitonic sort and a prefix sum of each row."""
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(X + row * BLOCK + offs)
    tl.store(Y + row * BLOCK + offs, tl.sort(x))
    tl.store(Totals + row * BLOCK + offs, tl.cumsum(x, 0))


@triton.jit
def attention(
    Q, K, V, Out, Lse, scale, tokens, stride_h, stride_m,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The fused-attention pattern: online softmax over tiles of keys. Q, K, V, Out [heads, tokens, D]."""
    i0 = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    offs_m = i0 + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D)
    rows = head * stride_h + offs_m[:, None] * stride_m + offs_d[None, :]
    q = tl.load(Q + rows, mask=offs_m[:, None] < tokens, other=0.0)  # [BLOCK_M, D]
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    log2_scale = scale * 1.4426950408889634
    end = tl.minimum(tokens, i0 + BLOCK_M) if CAUSAL else tokens
    for j0 in range(0, end, BLOCK_N):
        j = j0 + offs_n
        p_k = K + head * stride_h + j[None, :] * stride_m + offs_d[:, None]
        k = tl.load(p_k, mask=j[None, :] < tokens, other=0.0)  # [D, BLOCK_N]
        s = tl.dot(q, k) * log2_scale
        seen = j[None, :] < tokens
        if CAUSAL:
            seen = seen & (offs_m[:, None] >= j[None, :])
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        p = tl.math.exp2(s - m_new[:, None])
        rescale = tl.math.exp2(m_i - m_new)
        l_i = l_i * rescale + tl.sum(p, 1)
        p_v = V + head * stride_h + j[:, None] * stride_m + offs_d[None, :]
        v = tl.load(p_v, mask=j[:, None] < tokens, other=0.0)  # [BLOCK_N, D]
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        m_i = m_new
    inside = offs_m < tokens
    tl.store(Lse + head * tokens + offs_m, (m_i + tl.math.log2(l_i)) * 0.6931471805599453, mask=inside)
    tl.store(Out + rows, (acc / l_i[:, None]).to(Out.dtype.element_ty), mask=inside[:, None])
