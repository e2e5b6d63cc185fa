"""What only the compiled backend has: machine code in the user's cache, its own conversions, threads, start-up."""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from toolkit_kernels import numba_backend
from toolkit_kernels.numba_backend import consensus, objects
from toolkit_kernels.rules import Consensus, FisherMean, Inputs, Keep, NearSwap, Piece, Threshold, WeightedSum
from toolkit_kernels.spans import Span

# Adds two models in a process of its own and says which packages that took.
LINEAR = """
import sys
import numpy as np
from toolkit_kernels import numba_backend
from toolkit_kernels.rules import Inputs, Piece, WeightedSum
from toolkit_kernels.spans import Span
theta = tuple(Span.of(np.full(1000, x, np.float32)) for x in (1.0, 3.0))
out = Span.of(np.zeros(1000, np.float32))
counts = numba_backend.make().apply([Piece(Inputs(theta), WeightedSum(np.array([0.5, 0.5])), out)])
assert counts.tolist() == [0] and (out.data == 2.0).all()
print(*sorted({"numba", "torch"} & set(sys.modules)))
"""


def process(cache: Path, **environment: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "MELDKIT_CACHE": str(cache), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", LINEAR], env=environment, text=True, **pipes)


def imported(running: subprocess.Popen[str]) -> set[str]:
    output, errors = running.communicate(timeout=240)
    assert running.returncode == 0, errors
    return set(output.split())


def objects_in(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.o"))


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory) -> Path:
    """Two processes that compile at once."""
    cache = tmp_path_factory.mktemp("filled")
    both = [process(cache), process(cache)]
    assert [imported(running) for running in both] == [{"numba"}, {"numba"}]
    return cache


# --- the cache


def test_code_in_the_cache_needs_neither_numba_nor_torch(filled_cache: Path) -> None:
    assert imported(process(filled_cache)) == set()


def test_two_processes_leave_one_complete_file(filled_cache: Path) -> None:
    assert [path.name for path in objects_in(filled_cache)] == ["weighted_sum.o"]
    assert not list(filled_cache.rglob("*.partial"))


@pytest.mark.parametrize("damage", ["cut short", "a bit flipped", "emptied"])
def test_damaged_code_is_made_again(filled_cache: Path, damage: str) -> None:
    (path,) = objects_in(filled_cache)
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    path.write_bytes({"cut short": good[:middle], "a bit flipped": flipped, "emptied": b""}[damage])
    assert imported(process(filled_cache)) == {"numba"}
    assert imported(process(filled_cache)) == set()


def test_other_settings_find_other_code(filled_cache: Path) -> None:
    assert imported(process(filled_cache, NUMBA_OPT="2")) == {"numba"}
    both = objects_in(filled_cache)
    assert len(both) == 2
    assert both[0].parent != both[1].parent
    for path in both[0].parent.parent.iterdir():
        if path != both[0].parent:
            (path / "weighted_sum.o").unlink()
            path.rmdir()


def test_another_processor_finds_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    here = objects._key()
    options = dict(objects._target_machine_options())
    for changed in ({"cpu": "generic"}, {"features": options["features"].replace("+", "-", 1)}):
        monkeypatch.setattr(objects, "_target_machine_options", lambda changed=changed: options | changed)
        assert objects._key() != here


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert imported(process(tmp_path)) == {"numba"}
    assert not objects_in(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("")
    assert imported(process(tmp_path)) == {"numba"}


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize("home", ["", "~nobody-of-that-name/cache"])
def test_a_user_without_a_home_is_no_error(tmp_path: Path, home: str) -> None:
    """As in a container that runs under a user id without an entry in the list of users."""
    code = (
        "import os, pwd\n"
        "for name in ('HOME', 'XDG_CACHE_HOME'): os.environ.pop(name, None)\n"
        "def unknown(user): raise KeyError(user)\n"
        "pwd.getpwuid = pwd.getpwnam = unknown\n"
        f"os.environ['MELDKIT_CACHE'] = {home!r}\n"
        "from toolkit_kernels.numba_backend import objects\n"
        "print(objects.cache_folder())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("None", "")


def test_memory_of_another_device_is_refused() -> None:
    """An address on a GPU is none on the CPU: reading it ends the process."""
    here, there = (Span.of(torch.zeros(4, device=device)) for device in ("cpu", "meta"))
    backend, one = numba_backend.make(), WeightedSum(np.ones(1))
    keep = Consensus(np.ones(1), (Keep(),), elect=False, normalize=False, scale=1.0)
    mean = FisherMean(np.ones(1), np.zeros(1), np.ones(1))
    calls = [
        lambda: backend.apply([Piece(Inputs((there,)), one, here)]),
        lambda: backend.apply([Piece(Inputs((here,)), one, there)]),
        lambda: backend.apply([Piece(Inputs((here,), there), keep, here)]),
        lambda: backend.apply([Piece(Inputs((here,), there), NearSwap(0.1), here)]),
        lambda: backend.apply([Piece(Inputs((here,), None, (there,)), mean, here)]),
        lambda: backend.gram(Inputs((there,))),
        lambda: backend.histogram(Inputs((here,), there), None),
        lambda: backend.sift(Inputs((there,)), [(0, 1)], 1),
        lambda: backend.nth_equal(Inputs((there,)), 0, 0, 1),
        lambda: backend.non_finite(Inputs((there,))),
        lambda: backend.add_squares(here, there),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="a span lies on meta"):
            call()


def test_code_is_not_taken_from_a_folder_that_others_may_write(filled_cache: Path) -> None:
    (path,) = objects_in(filled_cache)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.parent.chmod(0o770)
    try:
        assert imported(process(filled_cache)) == {"numba"}
    finally:
        path.parent.chmod(0o700)


# --- numbers


def test_constants_that_are_named_twice_agree() -> None:
    from toolkit_kernels.numba_backend import bits
    from toolkit_kernels.rules import BLOCK
    from toolkit_kernels.spans import CODES

    assert 8 * numba_backend._STRIP_ITEMS == bits.FLOAT64_STRIP
    assert 8 * numba_backend._BLOCK_ITEMS == bits.FLOAT64_BLOCK
    assert bits.BLOCK == BLOCK
    assert (CODES["float16"], CODES["bfloat16"], CODES["float32"]) == (
        bits.FLOAT16,
        bits.BFLOAT16,
        bits.FLOAT32,
    )
    assert len(numba_backend._mask_row(Keep())) == consensus.NUM_COLUMNS


def test_float16_by_arithmetic_is_that_of_the_processor() -> None:
    import numba

    from toolkit_kernels.numba_backend import bits

    widen = numba.vectorize(["float32(uint16)"])(lambda x: bits.widened_float16(x))
    narrow = numba.vectorize(["uint16(float32)"])(lambda x: bits.narrowed_float16(x))
    every = np.arange(1 << 16, dtype=np.uint16)
    expected = every.view(np.float16).astype(np.float32)
    assert np.array_equal(
        widen(every).view(np.uint32)[~np.isnan(expected)], expected.view(np.uint32)[~np.isnan(expected)]
    )
    assert np.isnan(widen(every)[np.isnan(expected)]).all()

    finite = np.sort(expected[np.isfinite(expected)])
    middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(middles, np.float32(sign * np.inf)) for sign in (-1, 1)]
    beyond = np.array([65519.99, 65520.0, 1e38, np.inf, 1e-45, 2.0**-25], np.float32)
    numbers = np.concatenate([finite, middles, *near, beyond, -beyond])
    with np.errstate(over="ignore"):
        assert np.array_equal(narrow(numbers), numbers.astype(np.float16).view(np.uint16))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words) -> None:
    """kat_vectors of Random123 1.14."""
    out = np.zeros(4, np.uint32)
    draw = objects.load("philox", "philox", 7)
    draw(counter[0] | counter[1] << 32, counter[2], counter[3], *key, 1, out.ctypes.data)
    assert tuple(out) == words


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_nan_is_the_same(dtype: str) -> None:
    carrier = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32}[dtype]
    theta = Span.of(np.array([np.nan, -np.nan, np.inf, 1.0] * 300))
    out = Span(
        np.zeros(1200, {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}[dtype]), dtype
    )
    assert numba_backend.make().apply([Piece(Inputs((theta,)), WeightedSum(np.ones(1)), out)]) == [900]
    expected = {"float16": 0x7E00, "bfloat16": 0x7FC0, "float32": 0x7FC00000}[dtype]
    assert set(out.data.view(carrier).reshape(-1, 4)[:, :2].ravel().tolist()) == {expected}


def test_counts_of_long_inputs_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = numba_backend.make()
    inputs = Inputs((Span.of(np.random.default_rng(0).standard_normal(70_000).astype(np.float32)),))
    whole = [backend.histogram(inputs, None), backend.histogram(inputs, [0x3F80])]
    monkeypatch.setattr(numba_backend, "_MAX_COUNTED", 1024)
    parts = [backend.histogram(inputs, None), backend.histogram(inputs, [0x3F80])]
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert whole[0].sum() == 70_000
    assert whole[1].sum() > 0


@pytest.mark.slow
def test_offsets_have_64_bits() -> None:
    """2^32 + 4096 elements of bfloat16, mostly memory that was never touched, and so is all zeros."""
    size = (1 << 32) + 4096
    values = np.zeros(size, np.uint16)
    values[-1], values[-2] = 0x7FC0, 0x3F80
    inputs = Inputs((Span(values, "bfloat16"),))
    assert numba_backend.make().non_finite(inputs).tolist() == [1]
    assert numba_backend.make().nth_equal(inputs, 0, 0x3F800000, 1) == (1, size - 2)


# --- threads


def test_threads_do_not_disturb_one_another() -> None:
    backend = numba_backend.make()
    generator = np.random.default_rng(0)
    base, *theta = (Span.of(generator.standard_normal(50_000).astype(np.float32)) for _ in range(4))
    keep = (Keep(probability=0.5, key=(1, 2)), Keep(among=Threshold(0x3F800000, 7)), Keep())
    rule = Consensus(np.ones(3), keep, elect=True, normalize=True, scale=1.0)

    def merged(_: int) -> bytes:
        out = Span.of(np.zeros(50_000, np.float32))
        backend.apply([Piece(Inputs(tuple(theta), base), rule, out)])
        return out.data.tobytes() + backend.gram(Inputs(tuple(theta), base)).tobytes()

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(merged, range(64)))) == 1


def test_deltas_below_float32_are_left_out_by_their_index() -> None:
    """Their magnitudes equal zero, and so does the threshold."""
    theta, base, out = (Span.of(np.full(8, value)) for value in (1e-60, 0.0, 7.0))
    rule = Consensus(np.ones(1), (Keep(among=Threshold(0, 2)),), elect=False, normalize=False, scale=1.0)
    numba_backend.make().apply([Piece(Inputs((theta,), base), rule, out)])
    assert out.data.tolist() == [1e-60] * 3 + [0.0] * 5
