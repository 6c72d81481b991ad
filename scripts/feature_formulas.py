"""Closed forms of every feature under fixtures/features, in NumPy float64.

Nothing here calls torch or PEFT. A function takes arrays as they are stored
in the files (widened to float64) and returns the merged array. `W` is a
weight as stored in the base, `s` the scale of the adapter.
"""

import math

import numpy as np


# --------------------------------------------------------------------- LoRA


def scale(r, alpha, rslora=False):
    return alpha / math.sqrt(r) if rslora else alpha / r


def product(a, b):
    """B @ A of a linear layer, (out, in)."""
    return b @ a


def product_conv(a, b, shape):
    """Any convolution: A (r, in, *k), B (out, r, 1...), result (out, in, *k)."""
    r = a.shape[0]
    return (b.reshape(b.shape[0], r) @ a.reshape(r, -1)).reshape(shape)


def product_experts(a, b, experts, expert_first_in_b=False):
    """Per expert B_e @ A_e, (E, out, in).

    A (E*r, in): row e*r + k. B (out, r*E): column k*E + e as PEFT packs it,
    or column e*r + k (`expert_first_in_b`), as some other tools do.
    """
    r = a.shape[0] // experts
    a = a.reshape(experts, r, a.shape[1])
    if expert_first_in_b:
        b = b.reshape(b.shape[0], experts, r).transpose(1, 0, 2)
    else:
        b = b.reshape(b.shape[0], r, experts).transpose(2, 0, 1)
    return np.stack([b[e] @ a[e] for e in range(experts)])


def dora(W, delta, magnitude, axis):
    """m * V / |V|; `axis` is the axis that the magnitude runs along, the norm
    is over all others."""
    V = W + delta
    others = tuple(i for i in range(V.ndim) if i != axis)
    norm = np.sqrt((V * V).sum(axis=others, keepdims=True))
    shape = [1] * V.ndim
    shape[axis] = -1
    return magnitude.reshape(shape) * V / norm


def block_diagonal(dense, blocks, stacked_rows):
    """BD-LoRA stores the blocks side by side: (rows, cols/n) for n blocks of
    (rows/n, cols/n), one above the other."""
    assert stacked_rows
    rows, cols = dense.shape
    out = np.zeros((rows, cols * blocks))
    step = rows // blocks
    for i in range(blocks):
        out[i * step:(i + 1) * step, i * cols:(i + 1) * cols] = dense[i * step:(i + 1) * step]
    return out


def truncated(W, r):
    """W without its r smallest singular components (KaSA)."""
    u, sigma, vt = np.linalg.svd(W, full_matrices=False)
    keep = len(sigma) - r
    return (u[:, :keep] * sigma[:keep]) @ vt[:keep]


def adalora(a, b, e, alpha, r):
    return (b @ (a * e)) * alpha / (r + 1e-5)


def rows_replaced(W, indices, rows):
    out = W.copy()
    out[list(indices)] = rows
    return out


# ----------------------------------------------------------- LoHa, LoKr, IA3


def loha(w1a, w1b, w2a, w2b, s, shape, t1=None, t2=None):
    if t1 is None:
        return (s * (w1a @ w1b) * (w2a @ w2b)).reshape(shape)
    rebuild = lambda t, a, b: np.einsum("ijkl,jr,ip->prkl", t, b, a)
    return (s * rebuild(t1, w1a, w1b) * rebuild(t2, w2a, w2b)).reshape(shape)


def lokr(parts, s, shape):
    """`parts`: the tensors after `lokr_`, by name."""
    w1 = parts["w1"] if "w1" in parts else parts["w1_a"] @ parts["w1_b"]
    if "w2" in parts:
        w2 = parts["w2"]
    elif "t2" in parts:
        w2 = np.einsum("ijkl,jr,ip->prkl", parts["t2"], parts["w2_b"], parts["w2_a"])
    else:
        w2 = parts["w2_a"] @ parts["w2_b"]
    if w2.ndim == 4:
        w1 = w1[:, :, None, None]
    # A 3-D w2 (Conv1d, full) meets a w1 that kron widens at the *front*, so the
    # blocks fall elsewhere than in 4-D. PEFT computes and trains it that way.
    return (s * np.kron(w1, w2)).reshape(shape)


# ----------------------------------------------------- orthogonal rotations


def skew(vector, n):
    """Upper triangle in row order, minus its transpose."""
    out = np.zeros(vector.shape[:-1] + (n, n))
    rows, cols = np.triu_indices(n, 1)
    out[..., rows, cols] = vector
    return out - np.swapaxes(out, -1, -2)


def cayley(Q):
    """(I - Q)(I + Q)^-1; the two factors commute."""
    eye = np.eye(Q.shape[-1])
    return (eye - Q) @ np.linalg.inv(eye + Q)


def cayley_neumann(Q, terms):
    """I + 2Q + 2Q^2 + ... + Q^(terms-1); the last term has weight one."""
    n = Q.shape[-1]
    out = np.broadcast_to(np.eye(n), Q.shape).copy()
    if terms > 1:
        out += 2 * Q
    if terms > 2:
        power = Q @ Q
        out += 2 * power
        for _ in range(3, terms - 1):
            power = power @ Q
            out += 2 * power
        out += power @ Q
    return out


def blocks(matrices):
    n = sum(m.shape[0] for m in matrices)
    out = np.zeros((n, n))
    at = 0
    for m in matrices:
        out[at:at + m.shape[0], at:at + m.shape[0]] = m
        at += m.shape[0]
    return out


def oft_rotation(vector, features, neumann, terms=5, coft_eps=None):
    """The (features, features) matrix R of W' = W R^T."""
    n = int(round((1 + math.sqrt(1 + 8 * vector.shape[1])) / 2))
    Q = skew(vector, n)
    if coft_eps is not None:
        eps = coft_eps / math.sqrt(Q.shape[0])
        norm = np.sqrt((Q * Q).sum(axis=(1, 2), keepdims=True))
        Q = np.where(norm <= eps, Q, eps * Q / np.where(norm == 0, 1, norm))
    R = cayley_neumann(Q, terms) if neumann else cayley(Q)
    count = features // n
    return blocks([R[0 if R.shape[0] == 1 else i] for i in range(count)])


# --------------------------------------------------------------------- MiSS


def miss(block, features):
    """block (r, out): the delta at (o, i) is block[i % r, o]."""
    r = block.shape[0]
    return block.T[:, np.arange(features) % r]


def miss_bat(W, block):
    """block (out/r, r, r); every r-by-r tile T of row block o gets T@M[o] + M[o]."""
    r = block.shape[-1]
    out = np.zeros_like(W)
    for o in range(W.shape[0] // r):
        for i in range(W.shape[1] // r):
            tile = W[o * r:(o + 1) * r, i * r:(i + 1) * r]
            out[o * r:(o + 1) * r, i * r:(i + 1) * r] = tile @ block[o] + block[o]
    return out


# ------------------------------------------------------------ other methods


def butterfly_order(n, count, half):
    """BOFT's permutation of n indices, `count` blocks, `half` a block size."""
    size = n // count
    steps = size // half
    sequence = [*range(0, steps, 2), *range(1, steps, 2)]
    order = np.empty(size, dtype=int)
    for i, at in enumerate(sequence):
        order[i * half:(i + 1) * half] = np.arange(at * half, (at + 1) * half)
    return np.concatenate([start + order for start in range(0, n, size)])


def boft_matrix(R):
    """R (factors, blocks, b, b); the matrix M of W' = (W @ M.T) * s."""
    factors, count, size, _ = R.shape
    n = count * size
    total = np.eye(n)
    for i in range(factors):
        Q = 0.5 * (R[i] - R[i].transpose(0, 2, 1))
        rotation = blocks(list(cayley(Q)))
        P = np.eye(n)
        if factors > 1:
            P = P[butterfly_order(n, count // 2**i, size // 2)]
        total = P @ rotation @ P.T @ total
    return total


def householder(u, gram_schmidt=False):
    """HRA: the matrix H of W' = W @ H; u (in, r)."""
    n, r = u.shape
    H = np.eye(n)
    done = []
    for i in range(r):
        v = u[:, i].copy()
        if gram_schmidt:
            for w in done:
                v -= (w @ v) * w
        v = v / np.sqrt(v @ v)
        done.append(v)
        H = H - 2 * np.outer(H @ v, v)
    return H


def vblora_factor(logits, bank, topk):
    """(.., vectors) logits -> (.., length): softmax over the top k, mixed."""
    order = np.argsort(-logits, axis=-1, kind="stable")[..., :topk]
    top = np.take_along_axis(logits, order, axis=-1)
    weights = np.exp(top - top.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights[..., None] * bank[order]).sum(axis=-2)


def vblora_stored(indices, weights, bank):
    """The same from save_only_topk_weights: the last weight is 1 - sum."""
    weights = np.concatenate([weights, 1 - weights.sum(axis=-1, keepdims=True)], axis=-1)
    return (weights[..., None] * bank[indices.astype(int)]).sum(axis=-2)


def vblora(a, b):
    """a (r, in tiles, length), b (out tiles, r, length)."""
    return b.transpose(0, 2, 1).reshape(-1, b.shape[1]) @ a.reshape(a.shape[0], -1)


def randlora(A, B, lam, gamma, shape):
    """A (r, 1, min), B (max, bases, r), lam (r, bases), gamma (bases, min).

    The rows of one factor run over (r, bases), the columns of the other over
    (bases, r): PEFT pairs them as they lie."""
    small, large = min(shape), max(shape)
    count = lam.shape[1]
    a = (lam[:, :, None] * A[:, :, :small] * gamma[None, :, :]).reshape(-1, small)
    b = B[:large, :count, :].reshape(large, -1)
    return b @ a if shape[1] == small else (b @ a).T


def c3a(kernel, features):
    """kernel (out/b, in/b, b): block (m, n) at (p, l) is kernel[m, n, (l-p) % b]."""
    m, n, b = kernel.shape
    index = (np.arange(b)[None, :] - np.arange(b)[:, None]) % b
    return kernel[:, :, index].transpose(0, 2, 1, 3).reshape(m * b, n * b) / features


def road(variant, group, theta, alpha):
    """The rotation R of W' = R @ W, bias' = R @ bias."""
    if variant == "road_1":
        repeat = lambda v: np.repeat(v.reshape(-1, 1, group // 2), 2, axis=1).reshape(-1)
        first, second = repeat(alpha) * np.cos(repeat(theta)), repeat(alpha) * np.sin(repeat(theta))
    elif variant == "road_2":
        first, second = alpha * np.cos(theta), alpha * np.sin(theta)
    else:
        theta, alpha = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
        first = (alpha[:, 0] * np.cos(theta[:, 0])).reshape(-1)
        second = (alpha[:, 1] * np.sin(theta[:, 1])).reshape(-1)
    R = np.diag(first)
    for i in range(len(first)):
        inside = i % group
        if inside < group // 2:
            R[i, i + group // 2] = -second[i]
        else:
            R[i, i - group // 2] = second[i]
    return R


def delora(a, b, lam, norms, r):
    length = lambda m, axis: np.maximum(np.sqrt((m * m).sum(axis=axis)), 1e-4)
    d = lam / (r * length(a, 1) * length(b, 0))
    return ((b * d) @ a) * norms[None, :]


def gralora(a, b):
    """a (k, in/k, r), b (k, r, out/k); block (K, n) uses r/k columns of each."""
    k, inner, r = a.shape
    outer, sub = b.shape[2], r // k
    out = np.zeros((k * outer, k * inner))
    for K in range(k):
        for n in range(k):
            out[K * outer:(K + 1) * outer, n * inner:(n + 1) * inner] = (
                b[K, n * sub:(n + 1) * sub].T @ a[n, :, K * sub:(K + 1) * sub].T)
    return out


# ------------------------------------------------------------------ loralib


def merged_linear(a, b, enable):
    """A (r*n, in), B (out/len*n, r), n groups enabled; (out, in) with zero rows
    for the others."""
    groups = sum(enable)
    r, rows = a.shape[0] // groups, b.shape[0] // groups
    out = np.zeros((rows * len(enable), a.shape[1]))
    g = 0
    for i, on in enumerate(enable):
        if on:
            out[i * rows:(i + 1) * rows] = b[g * rows:(g + 1) * rows] @ a[g * r:(g + 1) * r]
            g += 1
    return out
