"""Device code that every kernel shares: elements of any dtype as float64, float64 rounded once, random words.

Arithmetic in float64 costs nothing here: data-centre GPUs do 64 such operations a clock and multiprocessor, far more
than memory feeds, and it is what makes their bits those of a CPU. On other GPUs (1/32 or 1/64 of that rate) results are
the same and slower.
"""

# Triton compiles this; to Python's type checker its constants, blocks and loops are something else than what they are.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def load_raw(address, offsets, size, element: tl.constexpr, aligned: tl.constexpr, masked: tl.constexpr):
    """Elements as they lie in memory.

    Args:
        address: int64, where the array begins. The container must be of shape [size].
        offsets: int64 block, which elements.
        size: number of elements; only read where masked.
        element: triton's type of an element.
        aligned: the address is a multiple of 16, and a thread may read 16 bytes at once.
        masked: some offsets lie beyond size; zero is read there.
    """
    pointer = address.to(tl.pointer_type(element))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    pointers = pointer + offsets
    return tl.load(pointers, mask=offsets < size, other=0) if masked else tl.load(pointers)


@triton.jit
def load(address, offsets, size, dtype: tl.constexpr, aligned: tl.constexpr, masked: tl.constexpr):
    """Elements as float64, exactly. Arguments as in load_raw, but for dtype: float16, bfloat16, float32, float64."""
    if dtype == "bfloat16":
        # Shifted by hand: the interpreter's own conversion of bfloat16 is wrong for some values.
        bits = load_raw(address, offsets, size, tl.uint16, aligned, masked).to(tl.uint32) << 16
        values = bits.to(tl.float32, bitcast=True).to(tl.float64)
    elif dtype == "float16":
        values = load_raw(address, offsets, size, tl.float16, aligned, masked).to(tl.float64)
    elif dtype == "float32":
        values = load_raw(address, offsets, size, tl.float32, aligned, masked).to(tl.float64)
    else:
        values = load_raw(address, offsets, size, tl.float64, aligned, masked)
    return values


@triton.jit
def load_any(address, code, offsets, size, aligned: tl.constexpr, masked: tl.constexpr):
    """The same where the dtype is only known when the kernel runs: code is one of spans.CODES."""
    values = tl.zeros(offsets.shape, tl.float64)
    if code == 0:
        values = load(address, offsets, size, "float16", aligned, masked)
    elif code == 1:
        values = load(address, offsets, size, "bfloat16", aligned, masked)
    elif code == 2:
        values = load(address, offsets, size, "float32", aligned, masked)
    else:
        values = load(address, offsets, size, "float64", aligned, masked)
    return values


@triton.jit
def store_raw(address, offsets, size, values, aligned: tl.constexpr, masked: tl.constexpr):
    """Write values as they are; arguments as in load_raw."""
    pointer = address.to(tl.pointer_type(values.dtype))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    if masked:
        tl.store(pointer + offsets, values, mask=offsets < size)
    else:
        tl.store(pointer + offsets, values)


@triton.jit
def store(address, offsets, size, values, dtype: tl.constexpr, aligned: tl.constexpr, masked: tl.constexpr):
    """Round float64 to float32 and from there to dtype, each to nearest even, and write; float64 is not rounded.

    Arguments as in load. Returns a block of booleans: which of the rounded values are NaN or infinite.
    """
    if dtype == "float64":
        store_raw(address, offsets, size, values, aligned, masked)
        finite = tl.abs(values) < float("inf")
    elif dtype == "float32":
        single = values.to(tl.float32)
        store_raw(address, offsets, size, single, aligned, masked)
        finite = tl.abs(single) < float("inf")
    elif dtype == "float16":
        half = values.to(tl.float32).to(tl.float16)
        store_raw(address, offsets, size, half, aligned, masked)
        finite = tl.abs(half.to(tl.float32)) < float("inf")
    else:
        # Rounded by hand: the interpreter truncates. Adding half of the last place, less one where the kept part is
        # even, carries into the exponent as it should; a NaN could lose its bits that way and is written by itself.
        bits = values.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        store_raw(address, offsets, size, rounded.to(tl.uint16), aligned, masked)
        finite = (rounded & 0x7F80) != 0x7F80
    return finite == 0


@triton.jit
def magnitude_bits(delta):
    """|delta| rounded to float32 as int32 with the same order."""
    return tl.abs(delta).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def random_words(seed, stream, first, BLOCK: tl.constexpr):
    """Words first, first + 1, ... of Philox4x32-10 as rules.Keep counts them.

    Args:
        seed: int64, the first word of the key below, the second above.
        stream: int64, the third word of the counter.
        first: int64, a multiple of 4.
        BLOCK: how many.

    Returns: uint32 block [BLOCK].
    """
    counter = first // 4 + tl.arange(0, BLOCK // 4)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, high, zero + stream.to(tl.uint32), zero)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))  # a b c d, a b c d, ...
