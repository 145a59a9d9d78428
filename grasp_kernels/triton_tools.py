"""What the Triton kernels share: roundings as the hardware needs them."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """To the stored dtype, to nearest even: the interpreter's own cast to bf16 truncates."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def nearest_tf32(x):
    """To 10 bits of mantissa, to nearest: matrix instructions drop the other 13 unseen."""
    bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # a NaN could carry over


@triton.jit
def _halves(x):
    """High and low part in tf32, each to nearest: together 22 bits. A NaN stays one in the low."""
    high = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    low = (x - high).to(tl.uint32, bitcast=True)
    return high, tl.where(x == x, low + 0x1000, low).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, acc, A_SPLIT: tl.constexpr, B_SPLIT: tl.constexpr):
    """acc + a b in tf32, of a number that is split both halves: as good as in fp32.

    What is exact in tf32, as a 16-bit number is, need not be split.
    """
    a_high, b_high = a, b
    if A_SPLIT:
        a_high, a_low = _halves(a)
    if B_SPLIT:
        b_high, b_low = _halves(b)
        acc = tl.dot(a_high, b_low, acc, input_precision="tf32")
    if A_SPLIT:
        acc = tl.dot(a_low, b_high, acc, input_precision="tf32")
    return tl.dot(a_high, b_high, acc, input_precision="tf32")


@triton.jit
def basis_tile(basis, at, j, d, k, basis_d, basis_k, VECTOR: tl.constexpr):
    """`[at, j]` of a basis `[d, k]`, 0 outside.

    With `VECTOR` whole vectors of 4 are read, the last perhaps beyond k, where memory is.
    """
    if VECTOR:
        tile = basis + at[:, None] * basis_d + j[None, :]
        readable = tl.multiple_of((k + 3) // 4 * 4, 4)
        V = tl.load(tile, mask=(at[:, None] < d) & (j[None, :] < readable), other=0.0)
        V = tl.where(j[None, :] < k, V, 0.0)
    else:
        tile = basis + at[:, None] * basis_d + j[None, :] * basis_k
        V = tl.load(tile, mask=(at[:, None] < d) & (j[None, :] < k), other=0.0)
    return V
