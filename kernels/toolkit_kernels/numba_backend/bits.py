"""Elements of any dtype at any address, in and out of float64: what the kernels of this package are made of.

Nothing needs to be aligned. Addresses come as int64, in tables; memory that is read or written in loops is at a
pointer, so that LLVM sees that scratch memory is nobody else's. The functions become part of the kernels that call
them.
"""

from typing import Any

import llvmlite.binding as llvm
import numba.extending
import numpy as np
from llvmlite import ir
from numba import njit, types

FLOAT16, BFLOAT16, FLOAT32 = 0, 1, 2  # spans.CODES; float64 is the rest

# Elements that are worked on at once: the float64 scratch of a strip lies in the first cache.
STRIP = 512
# Bytes of a strip's scratch memory. The three cache lines more keep strips apart in the sets of the first cache: at a
# distance of 4096 bytes, a dozen of them would evict one another.
FLOAT64_STRIP = 8 * STRIP + 192
# rules.BLOCK, and the same of it.
BLOCK = 1024
FLOAT64_BLOCK = 8 * BLOCK + 192
UINT32_STRIP = 4 * STRIP + 192

_features = llvm.get_host_cpu_features()
# Without such instructions, LLVM would call a function that is not there.
HAS_FLOAT16_INSTRUCTIONS = bool(_features.get("f16c") or _features.get("neon"))

# Of Any: what these make are called with other arguments than their definitions have.
intrinsic: Any = numba.extending.intrinsic
# Compiled into each caller, or once and called; never called from Python, so wrappers for that would be time lost.
_OPTIONS = {
    "boundscheck": False,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
inlined: Any = njit(forceinline=True, **_OPTIONS)
shared: Any = njit(**_OPTIONS)

_INT8, _INT32, _INT64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()
_MACHINE_TYPES = {
    types.uint16: ir.IntType(16),
    types.uint32: _INT32,
    types.int64: _INT64,
    types.float32: _FLOAT,
    types.float64: _DOUBLE,
}


def _at(builder, kind, address, i, machine_type):
    """A pointer to element i of those at an address or a pointer."""
    to_pointer = builder.inttoptr if isinstance(kind, types.Integer) else builder.bitcast
    return builder.gep(to_pointer(address, machine_type.as_pointer()), [i])


def _loader(element):
    """(address or pointer, i) -> element i of those that begin there."""
    machine_type = _MACHINE_TYPES[element]

    @intrinsic
    def load(typing_context, place, i):
        def generate(context, builder, signature, arguments):
            return builder.load(_at(builder, place, arguments[0], arguments[1], machine_type), align=1)

        return element(place, types.int64), generate

    return load


def _storer(element):
    """(address or pointer, i, value) -> nothing."""
    machine_type = _MACHINE_TYPES[element]

    @intrinsic
    def store(typing_context, place, i, value):
        def generate(context, builder, signature, arguments):
            address, index, number = arguments
            builder.store(number, _at(builder, place, address, index, machine_type), align=1)
            return context.get_dummy_value()

        return types.void(place, types.int64, element), generate

    return store


@intrinsic
def pointer(typing_context, address, num_bytes):
    """A pointer to ``num_bytes`` behind an address or another pointer."""

    def generate(context, builder, signature, arguments):
        return _at(builder, address, arguments[0], arguments[1], _INT8)

    return types.voidptr(address, types.int64), generate


load_uint16, store_uint16 = _loader(types.uint16), _storer(types.uint16)
load_uint32, store_uint32 = _loader(types.uint32), _storer(types.uint32)
load_int64, store_int64 = _loader(types.int64), _storer(types.int64)
load_float32, store_float32 = _loader(types.float32), _storer(types.float32)
load_float64, store_float64 = _loader(types.float64), _storer(types.float64)


@intrinsic
def float32_of(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.uint32), generate


@intrinsic
def bits_of(typing_context, number):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _INT32)

    return types.uint32(types.float32), generate


@intrinsic(prefer_literal=True)
def scratch(typing_context, num_bytes):
    """A pointer to ``num_bytes`` (a constant) of the stack, uninitialised, aligned to a cache line."""
    size = num_bytes.literal_value

    def generate(context, builder, signature, arguments):
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(_INT8, size))
            memory.align = 64
            return builder.bitcast(memory, _INT8.as_pointer())

    return types.voidptr(num_bytes), generate


@intrinsic
def _widen_float16(typing_context, bits):
    """uint16 -> float32 by the processor's instruction."""

    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), _FLOAT)

    return types.float32(types.uint16), generate


@intrinsic
def _narrow_float16(typing_context, number):
    """float32 -> uint16 by the processor's instruction, to nearest even."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


# --- one element


@inlined
def widened_float16(bits):
    """uint16 -> float32 by arithmetic on the bits."""
    shifted = np.uint32((np.uint32(bits) & np.uint32(0x7FFF)) << np.uint32(13))
    exponent = np.uint32(shifted & np.uint32(0x0F800000))
    rebiased = np.uint32(shifted + np.uint32(112 << 23))
    if exponent == np.uint32(0x0F800000):  # infinite or NaN
        magnitude = float32_of(np.uint32(rebiased + np.uint32(112 << 23)))
    elif exponent == np.uint32(0):  # subnormal: 2^-14 too much
        magnitude = float32_of(np.uint32(rebiased + np.uint32(1 << 23))) - np.float32(2.0**-14)
    else:
        magnitude = float32_of(rebiased)
    sign = np.uint32((np.uint32(bits) & np.uint32(0x8000)) << np.uint32(16))
    return float32_of(np.uint32(bits_of(magnitude) | sign))


@inlined
def narrowed_float16(number):
    """float32 -> uint16, rounded to nearest even by arithmetic on the bits; NaN becomes infinite."""
    bits = bits_of(number)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(
        (np.uint32(magnitude - np.uint32(112 << 23)) + np.uint32(0xFFF) + odd) >> np.uint32(13)
    )
    # Adding a half puts the last bit of a subnormal at that of the sum, which the addition rounds.
    subnormal = np.uint32(bits_of(np.float32(float32_of(magnitude) + np.float32(0.5))) - np.uint32(126 << 23))
    result = subnormal if magnitude < np.uint32(113 << 23) else normal
    if magnitude >= np.uint32(143 << 23):
        result = np.uint32(0x7C00)
    return np.uint16(result | ((bits >> np.uint32(16)) & np.uint32(0x8000)))


_to_float32, _to_float16 = (
    (_widen_float16, _narrow_float16) if HAS_FLOAT16_INSTRUCTIONS else (widened_float16, narrowed_float16)
)


@inlined
def _float16_at(address, i):
    return _to_float32(load_uint16(address, i))


@inlined
def _bfloat16_at(address, i):
    return float32_of(np.uint32(np.uint32(load_uint16(address, i)) << np.uint32(16)))


@inlined
def bfloat16_at(address, i):
    return np.float64(_bfloat16_at(address, i))


@inlined
def float32_at(address, i):
    return np.float64(load_float32(address, i))


@inlined
def float64_at(address, i):
    return load_float64(address, i)


@inlined
def magnitude_bits(number):
    """The bit pattern of the absolute value of a float32."""
    return np.uint32(bits_of(number) & np.uint32(0x7FFFFFFF))


@inlined
def difference32(x, y, i):
    """x[i] - y[i] of float32, in float32. That is the difference in float64 rounded to float32, since 53 >= 2 * 24 + 2
    (Figueroa 1995, "When is double rounding innocuous?")."""
    return np.float32(load_float32(x, i) - load_float32(y, i))


@inlined
def difference64(x, y, i):
    """x[i] - y[i] of float64, rounded to float32."""
    return np.float32(load_float64(x, i) - load_float64(y, i))


@inlined
def difference16(x, y, i):
    """x[i] - y[i] of bfloat16 and float32, in float32."""
    return np.float32(_bfloat16_at(x, i) - load_float32(y, i))


@inlined
def difference16_64(x, y, i):
    """x[i] - y[i] of bfloat16 and float64, rounded to float32."""
    return np.float32(bfloat16_at(x, i) - load_float64(y, i))


# --- a strip


@inlined
def item_size(code):
    return 2 if code <= BFLOAT16 else (4 if code == FLOAT32 else 8)


@shared
def as_float32(code, address, n, buffer):
    """Where the n elements at the address, not of float64, lie as float32: there, or in the buffer."""
    if code == FLOAT32:
        return address
    if code == BFLOAT16:
        for i in range(n):
            store_float32(buffer, i, _bfloat16_at(address, i))
    else:
        for i in range(n):
            store_float32(buffer, i, _float16_at(address, i))
    return buffer


@shared
def as_float64(code, address, n, buffer):
    """The n elements at the address as float64 in the buffer, whose address is returned."""
    if code == BFLOAT16:
        for i in range(n):
            store_float64(buffer, i, bfloat16_at(address, i))
    elif code == FLOAT32:
        for i in range(n):
            store_float64(buffer, i, float32_at(address, i))
    elif code == FLOAT16:
        for i in range(n):
            store_float64(buffer, i, np.float64(_float16_at(address, i)))
    else:
        for i in range(n):
            store_float64(buffer, i, load_float64(address, i))
    return buffer


@shared
def _write_bfloat16(address, n, source):
    """The largest magnitude, as bits of float32; NaN and what becomes infinite are wrong if there are any."""
    largest = np.uint32(0)
    for i in range(n):
        bits = bits_of(np.float32(load_float64(source, i)))
        odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
        largest = max(largest, np.uint32(bits & np.uint32(0x7FFFFFFF)))
        store_uint16(address, i, np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)))
    return largest


@shared
def _write_float16(address, n, source):
    largest = np.uint32(0)
    for i in range(n):
        number = np.float32(load_float64(source, i))
        largest = max(largest, magnitude_bits(number))
        store_uint16(address, i, _to_float16(number))
    return largest


@shared
def _write_float32(address, n, source):
    largest = np.uint32(0)
    for i in range(n):
        number = np.float32(load_float64(source, i))
        largest = max(largest, magnitude_bits(number))
        store_float32(address, i, number)
    return largest


@shared
def _mend(code, address, n, source):
    """Write the one quiet NaN of the dtype for every NaN; how many elements are NaN or infinite."""
    num_bad = 0
    for i in range(n):
        number = load_float64(source, i)
        is_nan = number != number
        if code == BFLOAT16:
            if is_nan:
                store_uint16(address, i, np.uint16(0x7FC0))
            num_bad += (load_uint16(address, i) & np.uint16(0x7F80)) == np.uint16(0x7F80)
        elif code == FLOAT16:
            if is_nan:
                store_uint16(address, i, np.uint16(0x7E00))
            num_bad += (load_uint16(address, i) & np.uint16(0x7C00)) == np.uint16(0x7C00)
        else:
            if is_nan:
                store_float32(address, i, np.float32(np.nan))
            num_bad += is_nan or abs(load_float32(address, i)) == np.float32(np.inf)
    return num_bad


@shared
def write_strip(code, address, n, source):
    """Round n float64 of the scratch ``source`` to float32 and from there to the dtype, each to nearest even.

    Returns how many of them are then NaN or infinite; as a rule none is, and finding out costs next to nothing.
    """
    if code == BFLOAT16:
        if _write_bfloat16(address, n, source) < np.uint32(0x7F7F8000):
            return 0
    elif code == FLOAT32:
        if _write_float32(address, n, source) < np.uint32(0x7F800000):
            return 0
    elif code == FLOAT16:
        if _write_float16(address, n, source) < np.uint32(0x477FF000):
            return 0
    else:
        num_bad = 0
        for i in range(n):
            number = load_float64(source, i)
            store_float64(address, i, number)
            num_bad += not abs(number) < np.inf
        return num_bad
    return _mend(code, address, n, source)
