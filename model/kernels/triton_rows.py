"""Rows whose width is no power of two, which Triton's blocks are: a row as a tuple of equal parts (`launch.parts`).

Of 5120 elements in 5 parts of 1024 none is idle; in one block of 8192 three in eight lanes would be.
"""

# fmt: off
# ruff: noqa: RUF005
import triton
import triton.language as tl


@triton.jit
def load_parts(ptr, start, end, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Elements start to end of a row, zeros around them, in the type of the memory."""
    found = ()  # grown by concatenation: what compiles this has no unpacking
    for k in tl.static_range(PARTS):
        c = k * BLOCK + tl.arange(0, BLOCK)
        found = found + (tl.load(ptr + c, mask=(c >= start) & (c < end), other=0.0),)
    return found


@triton.jit
def zero_parts(PARTS: tl.constexpr, BLOCK: tl.constexpr):
    found = ()
    for _ in tl.static_range(PARTS):
        found = found + (tl.zeros((BLOCK,), dtype=tl.float32),)
    return found


@triton.jit
def store_parts(ptr, values, start, end, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes elements start to end of a row."""
    for k in tl.static_range(PARTS):
        c = k * BLOCK + tl.arange(0, BLOCK)
        tl.store(ptr + c, values[k].to(ptr.dtype.element_ty), mask=(c >= start) & (c < end))


@triton.jit
def add_pairs(a, b, c, d):
    """Combines two sums in one reduction."""
    return a + c, b + d
# fmt: on
