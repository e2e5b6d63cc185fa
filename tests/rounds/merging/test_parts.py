"""The small parts: hashes, envelopes, tied names, buckets, optimizer states."""

import pytest
import torch

from toolkit.errors import MergeError
from toolkit.rounds.merging.buckets import Buffers, Kind, Layout, Stretch, cut, part_of
from toolkit.rounds.merging.integrity import check_envelope, check_result, sha256_of
from toolkit.rounds.merging.optimizer import slots_of_state, state_of_slots
from toolkit.rounds.merging.tied import tied_names

# --- hashes and checks


def test_the_hash_is_of_names_types_shapes_and_bits():
    state = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}
    digest = sha256_of(state)
    assert sha256_of({"a": torch.arange(6.0), "b": torch.ones(3, 2).T}) == digest
    others = [
        {"a": torch.arange(6.0), "c": torch.ones(2, 3)},
        {"a": torch.arange(6.0), "b": torch.ones(3, 2)},
        {"a": torch.arange(6), "b": torch.ones(2, 3)},
        {"b": torch.ones(2, 3), "a": torch.arange(6.0)},
        {"a": torch.tensor([-0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), "b": torch.ones(2, 3)},
    ]
    assert len({digest, *map(sha256_of, others)}) == 6


def test_hashes_of_all_kinds_of_tensors():
    state = {
        "half": torch.ones(3, dtype=torch.bfloat16),
        "none": torch.ones(0, 4),
        "scalar": torch.tensor(1.0),
    }
    assert len(sha256_of(state)) == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_envelope_is_exact(dtype):
    low, high = torch.randn(200_000).to(dtype), torch.randn(200_000).to(dtype)
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    check_envelope({"a": low}, [{"a": high}, {"a": low}], ["a"])
    for place in (0, 131_072, 199_999):
        outside = high.clone()
        outside[place] = torch.nextafter(high[place], torch.tensor(torch.inf, dtype=dtype))
        with pytest.raises(MergeError, match="a: 1 merged values lie outside"):
            check_envelope({"a": outside}, [{"a": high}, {"a": low}], ["a"])


def test_in_float64_the_envelope_has_the_slack_of_its_rounding():
    value = torch.tensor([1.0], dtype=torch.float64)
    states = [{"a": value}, {"a": value}]
    check_envelope({"a": value * (1 + 2**-52)}, states, ["a"])
    with pytest.raises(MergeError, match="outside"):
        check_envelope({"a": value * (1 + 1e-14)}, states, ["a"])


@pytest.mark.parametrize(
    ("merged", "message"),
    [
        ({"b": torch.ones(2)}, "other tensors"),
        ({"a": torch.ones(3)}, r"a: merged into torch.float32 \(3,\)"),
        ({"a": torch.ones(2, dtype=torch.float64)}, "a: merged into torch.float64"),
        ({"a": torch.tensor([1.0, torch.inf])}, "a: the merged tensor holds NaN or infinity"),
    ],
)
def test_results_that_are_unlike_the_states(merged, message):
    with pytest.raises(MergeError, match=message):
        check_result(merged, {"a": torch.ones(2)})


# --- tied names


def test_tied_names_are_equal_in_every_state():
    generator = torch.Generator().manual_seed(0)
    states = []
    for _ in range(3):
        weight = torch.randn(40, 30, generator=generator)
        almost = weight.clone()
        almost[39, 29] += 1
        states.append({"embed": weight, "almost": almost, "head": weight.clone(), "bias": torch.zeros(9)})
    states[0]["almost"] = states[0]["embed"].clone()  # in one state only
    states = [{**state, "other bias": torch.zeros(9)} for state in states]
    assert tied_names(states, []) == {"head": "embed"}
    assert tied_names(states, [{"head": states[0]["head"]}]) == {"embed": "head"}


# --- buckets

KINDS = {
    "large": Kind((100, 10), torch.float32),
    "small": Kind((7,), torch.float16),
    "count": Kind((), torch.int64),
    "none": Kind((0, 3), torch.float32),
    "a": Kind((2, 30), torch.float32),
    "b": Kind((30, 2), torch.float32),
}


def covered(buckets):
    return [(stretch.name, stretch.start, stretch.stop) for bucket in buckets for stretch in bucket]


def test_buckets_hold_every_element_once_and_little_at_a_time():
    units = [["large"], ["small"], ["count"], ["none"], ["a", "b"]]
    buckets = cut(units, KINDS, num_bytes=1200, divisible=True)
    assert covered(buckets) == [
        *(("large", start, min(start + 300, 1000)) for start in range(0, 1000, 300)),
        ("small", 0, 7),
        ("count", 0, 1),
        ("none", 0, 0),
        ("a", 0, 60),
        ("b", 0, 60),
    ]
    for bucket in buckets:
        names = [stretch.name for stretch in bucket]
        assert len(set(names)) == len(names)
        assert sum((s.stop - s.start) * KINDS[s.name].dtype.itemsize for s in bucket) <= 1200
    whole = cut(units, KINDS, num_bytes=1200, divisible=False)
    assert covered(whole)[0] == ("large", 0, 1000)
    # What must stay together does.
    assert [s.name for s in cut([["a", "b"]], KINDS, num_bytes=8, divisible=True)[0]] == ["a", "b"]


def test_a_layout_carries_every_bit():
    state = {name: torch.randn(kind.shape).to(kind.dtype) for name, kind in KINDS.items()}
    state["count"] = torch.tensor(2**62 + 1)
    result = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    buffers = Buffers(torch.device("cpu"))
    for bucket in cut([[name] for name in KINDS], KINDS, num_bytes=500, divisible=True):
        layout = Layout(bucket, KINDS)
        buffers.reset()
        first, second = buffers.take(layout.num_bytes), buffers.take(layout.num_bytes)
        layout.pack(state, first)
        part = layout.unpack(first, torch.device("cpu"))
        here = part_of(state, bucket)
        assert all(torch.equal(part[name], here[name]) for name in here)
        assert part.keys() == here.keys()
        layout.pack_part(part, second)
        layout.write(second, result)
    assert all(torch.equal(result[name], state[name]) for name in state)


def test_a_layout_leaves_out_what_a_fisher_does_not_cover():
    layout = Layout([Stretch("a", 0, 60), Stretch("small", 0, 7)], {"small": Kind((7,), torch.float32)})
    buffer = Buffers(torch.device("cpu")).take(layout.num_bytes)
    layout.pack({"small": torch.arange(7.0)}, buffer)
    assert layout.num_bytes == 32
    assert list(layout.unpack(buffer, torch.device("cpu"))) == ["small"]


# --- optimizer states


def slots(value, names=("w", "b")):
    return {
        "exp_avg": {name: torch.full((3,), value) for name in names},
        "exp_avg_sq": {name: torch.full((3,), value**2) for name in names},
    }


def test_slots_travel_as_one_state():
    state = state_of_slots(slots(3.0, names=("a/b", "w")))
    assert list(state) == ["exp_avg/a/b", "exp_avg/w", "exp_avg_sq/a/b", "exp_avg_sq/w"]
    again = slots_of_state(state)
    assert list(again) == ["exp_avg", "exp_avg_sq"]
    assert again["exp_avg_sq"]["a/b"].tolist() == [9.0] * 3
    assert slots_of_state(state_of_slots({})) == {}
