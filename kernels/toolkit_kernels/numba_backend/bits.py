"""Elements of any dtype at any address, in and out of float64: what the kernels of this package are made of.

Addresses are int64; nothing needs to be aligned. Sixteen-bit floats are converted by arithmetic on their bits, so that
no processor needs instructions for them. The functions are compiled into the kernels that call them.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

FLOAT16, BFLOAT16, FLOAT32 = 0, 1, 2  # spans.CODES; float64 is the rest

# Elements that are worked on at once: the float64 scratch of a strip lies in the first cache.
STRIP = 512

inlined = njit(forceinline=True, boundscheck=False, error_model="numpy")

_INT8, _INT32, _INT64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()
_MACHINE_TYPES = {
    types.uint16: ir.IntType(16),
    types.uint32: _INT32,
    types.int64: _INT64,
    types.float32: _FLOAT,
    types.float64: _DOUBLE,
}


def _loader(element):
    """(address, i) -> element i of those that begin at the address."""
    machine_type = _MACHINE_TYPES[element]

    @intrinsic
    def load(typing_context, address, i):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], machine_type.as_pointer())
            return builder.load(builder.gep(pointer, [arguments[1]]), align=1)

        return element(types.int64, types.int64), generate

    return load


def _storer(element):
    """(address, i, value) -> nothing."""
    machine_type = _MACHINE_TYPES[element]

    @intrinsic
    def store(typing_context, address, i, value):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], machine_type.as_pointer())
            builder.store(arguments[2], builder.gep(pointer, [arguments[1]]), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, element), generate

    return store


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
    """The address of ``num_bytes`` (a constant) of the stack, uninitialised, aligned to a cache line."""
    size = num_bytes.literal_value

    def generate(context, builder, signature, arguments):
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(_INT8, size))
            memory.align = 64
            return builder.ptrtoint(memory, _INT64)

    return types.int64(num_bytes), generate


# --- one element


@inlined
def float16_at(address, i):
    bits = np.uint32(load_uint16(address, i))
    shifted = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    exponent = np.uint32(shifted & np.uint32(0x0F800000))
    rebiased = np.uint32(shifted + np.uint32(112 << 23))
    if exponent == np.uint32(0x0F800000):  # infinite or NaN
        magnitude = float32_of(np.uint32(rebiased + np.uint32(112 << 23)))
    elif exponent == np.uint32(0):  # subnormal: 2^-14 too much
        magnitude = float32_of(np.uint32(rebiased + np.uint32(1 << 23))) - np.float32(2.0**-14)
    else:
        magnitude = float32_of(rebiased)
    sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
    return np.float64(float32_of(np.uint32(bits_of(magnitude) | sign)))


@inlined
def bfloat16_at(address, i):
    return np.float64(float32_of(np.uint32(np.uint32(load_uint16(address, i)) << np.uint32(16))))


@inlined
def float32_at(address, i):
    return np.float64(load_float32(address, i))


@inlined
def float64_at(address, i):
    return load_float64(address, i)


@inlined
def magnitude_bits(x):
    """The bit pattern of |x| rounded to float32."""
    return np.uint32(bits_of(np.float32(x)) & np.uint32(0x7FFFFFFF))


@inlined
def to_float16(x):
    """Bits of x rounded to float32 and then to float16, each to nearest even; every NaN becomes 0x7E00."""
    bits = bits_of(np.float32(x))
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
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    return np.uint16(np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else np.uint32(result | sign))


@inlined
def to_bfloat16(x):
    """Bits of x rounded to float32 and then to bfloat16, each to nearest even; every NaN becomes 0x7FC0."""
    bits = bits_of(np.float32(x))
    odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    is_nan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(np.uint32(0x7FC0) if is_nan else rounded)


# --- a strip


@inlined
def read_strip(code, address, n, to):
    """n elements at the address, as float64, to the scratch ``to``."""
    if code == BFLOAT16:
        for i in range(n):
            store_float64(to, i, bfloat16_at(address, i))
    elif code == FLOAT32:
        for i in range(n):
            store_float64(to, i, float32_at(address, i))
    elif code == FLOAT16:
        for i in range(n):
            store_float64(to, i, float16_at(address, i))
    else:
        for i in range(n):
            store_float64(to, i, float64_at(address, i))


@inlined
def write_strip(code, address, n, source):
    """Round n float64 of the scratch ``source`` to the address; how many of them are then NaN or infinite."""
    num_bad = 0
    if code == BFLOAT16:
        for i in range(n):
            bits = to_bfloat16(load_float64(source, i))
            store_uint16(address, i, bits)
            num_bad += (bits & np.uint16(0x7F80)) == np.uint16(0x7F80)
    elif code == FLOAT32:
        for i in range(n):
            number = np.float32(load_float64(source, i))
            store_float32(address, i, number)
            num_bad += not abs(number) < np.float32(np.inf)
    elif code == FLOAT16:
        for i in range(n):
            bits = to_float16(load_float64(source, i))
            store_uint16(address, i, bits)
            num_bad += (bits & np.uint16(0x7C00)) == np.uint16(0x7C00)
    else:
        for i in range(n):
            number = load_float64(source, i)
            store_float64(address, i, number)
            num_bad += not abs(number) < np.inf
    return num_bad


@inlined
def item_size(code):
    return 2 if code <= BFLOAT16 else (4 if code == FLOAT32 else 8)
