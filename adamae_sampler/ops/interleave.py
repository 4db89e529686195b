"""From interleaved values to channels and back, within a thread. Loads and stores can then be of 16 bytes."""

from __future__ import annotations

from adamae_sampler.ops.backend import jit, tl


@jit
def _halves(x):
    """[R, 2 W] -> its even and its odd columns, [R, W] each. Both stay in the threads that hold them."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@jit
def _merged(even, odd):
    """The inverse of `_halves`."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@jit
def _quarters(x):
    """[R, 4 W] -> its columns 4 i, 4 i + 1, 4 i + 2 and 4 i + 3."""
    even, odd = _halves(x)
    a, c = _halves(even)
    b, d = _halves(odd)
    return a, b, c, d


@jit
def _merged4(a, b, c, d):
    """The inverse of `_quarters`."""
    return _merged(_merged(a, c), _merged(b, d))


@jit
def _sixteenths(x):
    """[R, 16] -> its columns, [R, 1] each."""
    x0, x1, x2, x3 = _quarters(x)
    c0, c4, c8, c12 = _quarters(x0)
    c1, c5, c9, c13 = _quarters(x1)
    c2, c6, c10, c14 = _quarters(x2)
    c3, c7, c11, c15 = _quarters(x3)
    return c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15


@jit
def _merged16(c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15):
    """The inverse of `_sixteenths`."""
    x0, x1 = _merged4(c0, c4, c8, c12), _merged4(c1, c5, c9, c13)
    x2, x3 = _merged4(c2, c6, c10, c14), _merged4(c3, c7, c11, c15)
    return _merged4(x0, x1, x2, x3)


@jit
def by_channel(a, b, c):
    """16 pixels of 3 channels, in the layout of the prediction: three [R, 16], rgbrgb... -> all r, all g, all b.

    A thread that loads 48 values in runs of 16 bytes has all channels of a pixel. So no value moves between threads,
    and in compiled code no value moves at all.
    """
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15 = _sixteenths(a)
    b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14, b15 = _sixteenths(b)
    c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15 = _sixteenths(c)
    return (
        _merged16(a0, a3, a6, a9, a12, a15, b2, b5, b8, b11, b14, c1, c4, c7, c10, c13),
        _merged16(a1, a4, a7, a10, a13, b0, b3, b6, b9, b12, b15, c2, c5, c8, c11, c14),
        _merged16(a2, a5, a8, a11, a14, b1, b4, b7, b10, b13, c0, c3, c6, c9, c12, c15),
    )


@jit
def by_pixel(r, g, b):
    """The inverse of `by_channel`."""
    r0, r1, r2, r3, r4, r5, r6, r7, r8, r9, r10, r11, r12, r13, r14, r15 = _sixteenths(r)
    g0, g1, g2, g3, g4, g5, g6, g7, g8, g9, g10, g11, g12, g13, g14, g15 = _sixteenths(g)
    b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14, b15 = _sixteenths(b)
    return (
        _merged16(r0, g0, b0, r1, g1, b1, r2, g2, b2, r3, g3, b3, r4, g4, b4, r5),
        _merged16(g5, b5, r6, g6, b6, r7, g7, b7, r8, g8, b8, r9, g9, b9, r10, g10),
        _merged16(b10, r11, g11, b11, r12, g12, b12, r13, g13, b13, r14, g14, b14, r15, g15, b15),
    )
