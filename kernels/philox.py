"""Counter-based normals, bit for bit those of csrc/common/philox.h.

Kernels that use them are launched with ``enable_fp_fusion=False``: a fused multiply-add would change the last bit.
"""

import triton
import triton.language as tl


@triton.jit
def radius(word):
    """r = √(−2 ln u) with u = w·2⁻³² + 2⁻³³."""
    u = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    i = u.to(tl.int32, bitcast=True)
    exponent = (i - 0x3F3504F3) >> 23
    x = (i - exponent * (1 << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    z = x * x
    p = x * 0.0868527889251709 + -0.14326858520507812
    p = p * x + 0.14948199689388275
    p = p * x + -0.16570641100406647
    p = p * x + 0.19958797097206116
    p = p * x + -0.2500152587890625
    p = p * x + 0.3333404064178467
    p = p * (x * z)
    p = p + e * -2.12194440e-4
    p = p - 0.5 * z
    return tl.sqrt_rn(-2.0 * ((x + p) + e * 0.693359375))


@triton.jit
def circle(word):
    """(cos, sin) of 2π·w·2⁻³²; the quadrant comes off exactly, in integers."""
    quadrant = (word + (1 << 29)) >> 30
    y = (word - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 9.313225746154785e-10
    t = y * y
    s = t * -0.0045560323633253574 + 0.0796605572104454
    s = s * t + -0.6459611058235168
    s = s * t + 1.570796251296997
    s = s * y
    c = t * 0.0008935543592087924 + -0.0208552498370409
    c = c * t + 0.25366851687431335
    c = c * t + -1.2337005138397217
    c = c * t + 1.0
    swap = (quadrant & 1) != 0
    sine = tl.where(swap, c, s).to(tl.uint32, bitcast=True) ^ ((quadrant & 2) << 30)
    cosine = tl.where(swap, s, c).to(tl.uint32, bitcast=True) ^ (((quadrant + 1) & 2) << 30)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def words(seed, row_id, step, draw, quad):
    """Philox4x32-10 words of each quad of a row."""
    # uint32 counters: wider ones would select Philox4x64.
    quad = quad.to(tl.uint32)
    zero = quad * 0
    low, high = (row_id & 0xFFFFFFFF).to(tl.uint32), (row_id >> 32).to(tl.uint32)
    return tl.philox(seed, quad, zero + low, zero + high, zero + (step | (draw << 24)).to(tl.uint32))


@triton.jit
def normals(seed, row_id, step, draw, quad):
    """Standard normals of the four elements of each quad of a row: ``[4 · quads]``, in their order."""
    w0, w1, w2, w3 = words(seed, row_id, step, draw, quad)
    r0, r1 = radius(w0), radius(w2)
    cos0, sin0 = circle(w1)
    cos1, sin1 = circle(w3)
    return tl.interleave(tl.interleave(r0 * cos0, r1 * cos1), tl.interleave(r0 * sin0, r1 * sin1))
