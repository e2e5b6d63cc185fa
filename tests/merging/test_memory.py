"""Merging states in memory: right, fresh each time, nothing left out."""

import gc
import itertools
import re
from math import fsum

import psutil
import pytest
import torch
from safetensors.torch import save_file

from toolkit.errors import ConfigError, InputError, MergeError, ModelError
from toolkit.merging.fisher_files import norm_and_mean, open_fisher
from toolkit.merging.group import MemoryReader
from toolkit.merging.memory import measure_fisher, merge_state_dicts
from toolkit_kernels import dispatch

SHAPES = {
    "embed": (300, 64),
    "layer.0": (64, 128),
    "layer.1": (64, 128),
    "bias": (7,),
    "scale": (),
    "none": (0, 4),
}


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return tensors | {"positions": torch.arange(5)}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_linear_is_the_weighted_mean_in_float64_rounded_once(dtype: torch.dtype, num_threads: int) -> None:
    states, weights = [state(k, dtype) for k in range(3)], [0.5, 0.4, 0.3]
    merged = merge_state_dicts(states, "linear", weight=weights, num_threads=num_threads)
    for name in SHAPES:
        total = sum(w / fsum(weights) * s[name].double() for w, s in zip(weights, states, strict=True))
        assert merged[name].dtype == dtype
        assert torch.equal(merged[name], total.float().to(dtype)), name
    assert torch.equal(merged["positions"], states[0]["positions"])


def test_the_same_bits_for_any_number_of_threads_and_any_backend() -> None:
    states, base = [state(k, torch.bfloat16) for k in range(3)], state(9, torch.bfloat16)
    parameters = {"weight": [1.0, 0.5, 0.7], "density": 0.3, "seed": 5}
    for method in ("ties", "dare_ties", "task_arithmetic"):
        given = parameters if method != "task_arithmetic" else {"weight": [1.0, 0.5, 0.7]}
        results = [
            merge_state_dicts(states, method, base=base, backend=backend, num_threads=threads, **given)
            for backend, threads in (("auto", 1), ("auto", 4), ("torch", 2), ("reference", 1))
        ]
        assert all(same(results[0], other) for other in results[1:]), method


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.3, 0.4, 0.3], [0.2, 0.5, 0.3], [0.7, 0.1, 0.1]])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "fisher", "multislerp", "model_stock"])
def test_models_in_any_order_give_the_same_bits(method: str, weights: list[float]) -> None:
    """With such weights the exact result often lies half-way between two numbers of bfloat16."""
    base = state(9, torch.bfloat16)
    states = [state(k, torch.bfloat16) for k in range(3)]
    for (
        one
    ) in states:  # fine-tuning leaves rows of an embedding alone; samples of the content then look the same
        one["embed"][:200] = base["embed"][:200]
        one["embed"][208:] = base["embed"][208:]
    fisher = [{n: torch.rand(s).to(torch.bfloat16) for n, s in SHAPES.items()} for _ in range(3)]
    results = []
    for order in itertools.permutations(range(3)):
        given: dict = {} if method == "model_stock" else {"weight": [weights[k] for k in order]}
        given |= {"density": 0.5} if method in ("ties", "dare_ties") else {}
        given |= {"fisher": [fisher[k] for k in order]} if method == "fisher" else {}
        given |= {"base": base} if method in ("ties", "dare_ties", "model_stock") else {}
        results.append(merge_state_dicts([states[k] for k in order], method, **given))
    assert all(same(results[0], other) for other in results[1:])


def test_fisher_weighs_each_element_and_falls_back_where_nothing_is_known() -> None:
    states = [state(0), state(1)]
    fisher = [{n: torch.rand(s) for n, s in SHAPES.items()} for _ in range(2)]
    for tensors in fisher:
        tensors["layer.0"][3] = 0
        del tensors["bias"]
    merged = merge_state_dicts(
        states, "fisher", fisher=fisher, weight=[1.0, 2.0], fisher_normalize="none", fisher_floor=0.0
    )
    f = [tensors["layer.0"].double() * w for tensors, w in zip(fisher, (1.0, 2.0), strict=True)]
    expected = (f[0] * states[0]["layer.0"] + f[1] * states[1]["layer.0"]) / (f[0] + f[1])
    mean = (states[0]["layer.0"].double() + 2 * states[1]["layer.0"].double()) / 3
    expected[3] = mean[3]
    torch.testing.assert_close(merged["layer.0"], expected.float(), rtol=2e-7, atol=0)
    plain = (states[0]["bias"].double() + 2 * states[1]["bias"].double()) / 3
    torch.testing.assert_close(merged["bias"], plain.float(), rtol=2e-7, atol=0)


def test_writes_into_the_tensors_it_is_given_even_those_of_a_state() -> None:
    states = [state(0), state(1)]
    fresh = merge_state_dicts(states, weight=1.0)
    out = {name: torch.full_like(tensor, 3) for name, tensor in states[0].items()}
    pointers = {name: tensor.data_ptr() for name, tensor in out.items()}
    assert merge_state_dicts(states, weight=1.0, out=out) is out
    assert same(out, fresh)
    assert pointers == {name: tensor.data_ptr() for name, tensor in out.items()}
    in_place = merge_state_dicts(states, weight=1.0, out=states[0])
    assert same(in_place, fresh)


def test_out_dtype_and_progress() -> None:
    done: list[int] = []
    merged = merge_state_dicts([state(0)], weight=1.0, out_dtype=torch.bfloat16, on_progress=done.append)
    assert merged["embed"].dtype == torch.bfloat16
    assert sum(done) == sum(merged[name].numel() * 2 for name in SHAPES)


def test_seed_decides_the_random_masks() -> None:
    states, base = [state(0), state(1)], state(2)
    first, again, other = (
        merge_state_dicts(states, "dare_linear", base=base, weight=1.0, density=0.5, seed=seed)
        for seed in (1, 1, 2)
    )
    assert same(first, again)
    assert not same(first, other)


def test_a_thousand_merges_are_fresh_and_hold_no_memory() -> None:
    states = [state(0), state(1)]
    out: dict[str, torch.Tensor] | None = None
    process = psutil.Process()
    before = 0
    for step in range(1000):
        states[1]["bias"].fill_(step)
        out = merge_state_dicts(states, weight=1.0, out=out)
        expected = (states[0]["bias"].double() * 0.5 + step * 0.5).float()
        assert torch.equal(out["bias"], expected)
        if step == 200:
            gc.collect()
            before = process.memory_info().rss
    assert process.memory_info().rss - before < 20e6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "liner", "weight": 1.0}, InputError, "did you mean 'linear'"),
        ({"method": "linear"}, ConfigError, "needs the parameter 'weight'"),
        ({"method": "linear", "wieght": 1.0}, ConfigError, "no parameter 'wieght'; did you mean 'weight'"),
        ({"method": "linear", "weight": [1.0]}, ConfigError, "1 values for 2 models"),
        ({"method": "ties", "weight": 1.0}, InputError, "needs a base"),
        ({"method": "fisher", "weight": 1.0}, InputError, "needs the Fisher"),
        ({"weight": [1.0, float("nan")]}, ConfigError, "weight of state 1 is nan"),
        ({"method": "nuslerp", "weight": [float("inf"), 1.0]}, ConfigError, "weight of state 0 is inf"),
        ({"weight": 1.0, "out_dtype": torch.float8_e4m3fn}, InputError, "out_dtype is torch.float8_e4m3fn"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        merge_state_dicts([state(0), state(1)], **arguments)


def test_states_that_do_not_fit_name_the_tensor() -> None:
    first, second = state(0), state(1)
    del second["bias"]
    with pytest.raises(ModelError, match="state 1 lacks bias"):
        merge_state_dicts([first, second], weight=1.0)
    second = state(1) | {"bias": torch.zeros(8)}
    with pytest.raises(ModelError, match=r"bias: state 1 has shape \(8,\), the first \(7,\)"):
        merge_state_dicts([first, second], weight=1.0)
    second = state(1) | {"positions": torch.arange(5) + 1}
    with pytest.raises(ModelError, match=r"positions.*other values"):
        merge_state_dicts([first, second], weight=1.0)


def test_nan_is_never_merged_silently() -> None:
    first, second = state(0), state(1)
    second["layer.1"][2, 2] = float("nan")
    with pytest.raises(MergeError, match=r"layer\.1: state 1 holds NaN or infinity"):
        merge_state_dicts([first, second], weight=1.0)
    big = {name: torch.full(shape, 60000.0, dtype=torch.float16) for name, shape in SHAPES.items()}
    with pytest.raises(MergeError, match="overflows"):
        merge_state_dicts([big, big], weight=1.0, normalize=False)


# --- memory that is shared


def tied_state(seed: int) -> dict[str, torch.Tensor]:
    """As state_dict() of a language model whose embeddings are its head."""
    one = state(seed)
    return one | {"head": one["embed"]}


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "ram"])
@pytest.mark.parametrize("in_place", [True, False])
def test_tied_tensors_are_merged_once_and_stay_tied(method: str, in_place: bool) -> None:
    given = {"linear": {"weight": 1.0}, "ram": {}}.get(method, {"weight": 1.0, "density": 0.5})
    given |= {} if method == "linear" else {"base": tied_state(9)}
    states = [tied_state(k) for k in range(2)]
    plain = {k: {n: t for n, t in v.items() if n != "head"} for k, v in enumerate(states)}
    expected = merge_state_dicts(
        [plain[0], plain[1]], method, **given | ({"base": state(9)} if "base" in given else {})
    )
    merged = merge_state_dicts(states, method, out=states[0] if in_place else None, **given)
    assert torch.equal(merged["embed"], expected["embed"])
    assert merged["head"].data_ptr() == merged["embed"].data_ptr()


def test_tied_tensors_take_the_fisher_that_one_of_their_names_has() -> None:
    """named_parameters() gives a tied parameter once."""
    states = [tied_state(k) for k in range(2)]
    fisher = [{"head": torch.rand(SHAPES["embed"])} for _ in states]
    merged = merge_state_dicts(states, "fisher", fisher=fisher)
    alone = merge_state_dicts(
        [{"head": s["head"]} for s in states], "fisher", fisher=[{"head": f["head"]} for f in fisher]
    )
    assert torch.equal(merged["embed"], alone["head"])


def test_a_tie_of_some_states_only_is_none_of_the_result() -> None:
    states = [tied_state(0), state(1) | {"head": torch.ones(SHAPES["embed"])}]
    merged = merge_state_dicts(states, weight=1.0)
    assert torch.equal(merged["head"], ((states[0]["head"].double() + 1) / 2).float())
    assert not torch.equal(merged["head"], merged["embed"])
    before = {name: tensor.clone() for name, tensor in states[0].items()}
    with pytest.raises(
        InputError, match=r"out\['embed'\] and out\['head'\] are one tensor, and in state 1 they differ"
    ):
        merge_state_dicts(states, weight=1.0, out=states[0])
    assert same(states[0], before)
    states[1]["head"] = states[1]["embed"].clone()  # equal is as good as tied
    merge_state_dicts(states, weight=1.0, out=states[0])
    assert torch.equal(
        states[0]["head"], ((before["head"].double() + states[1]["head"].double()) / 2).float()
    )


def test_outputs_that_would_overwrite_what_is_still_read_are_refused() -> None:
    states = [state(0), state(1)]
    swapped = states[0] | {"layer.0": states[0]["layer.1"], "layer.1": states[0]["layer.0"]}
    with pytest.raises(
        InputError, match=r"out\['layer\.\d'\] overlaps layer\.\d of state 0, which is another tensor"
    ):
        merge_state_dicts(states, weight=1.0, out=swapped)
    memory = torch.zeros(64 * 128 + 64)
    shifted = states[0] | {"layer.0": memory[:-64].view(64, 128), "layer.1": memory[64:].view(64, 128)}
    with pytest.raises(InputError, match="overlap in memory"):
        merge_state_dicts(states, weight=1.0, out=shifted)


def test_everything_lies_on_one_device() -> None:
    states = [state(0), state(1)]
    elsewhere = {name: tensor.to("meta") for name, tensor in states[0].items()}
    fisher = [{n: torch.rand(s) for n, s in SHAPES.items()}, {n: elsewhere[n] for n in SHAPES}]
    for given in (
        {"out": elsewhere},
        {"fisher": fisher, "method": "fisher"},
        {"base": elsewhere, "method": "model_stock"},
    ):
        arguments = {} if given.get("method") == "model_stock" else {"weight": 1.0}
        with pytest.raises(InputError, match=r"embed of .* on cpu, embed of .* on meta"):
            merge_state_dicts(states, **arguments, **given)


# --- numbers that cannot be


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "method",
    ["ties", "dare_linear", "dare_ties", "breadcrumbs", "della", "ram", "sce", "arcee_fusion", "model_stock"],
)
@pytest.mark.parametrize("who", ["state 0", "base"])
def test_what_a_method_leaves_out_is_looked_at_too(method: str, who: str, value: float) -> None:
    states, base = [state(0), state(1)], state(9)
    states = states[:1] if method == "arcee_fusion" else states
    (base if who == "base" else states[0])["layer.1"][2, 2] = value
    given = {} if method in ("ram", "sce", "arcee_fusion", "model_stock") else {"weight": 1.0}
    given |= {"density": 0.3} if method in ("ties", "dare_linear", "dare_ties", "della") else {}
    with pytest.raises(MergeError, match=rf"layer\.1: {who} holds NaN or infinity"):
        merge_state_dicts(states, method, base=base, **given)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
def test_what_is_no_fisher_information_is_named(value: float) -> None:
    fisher = [{n: torch.rand(s) for n, s in SHAPES.items()} for _ in range(2)]
    fisher[1]["layer.0"][3, 4] = value
    with pytest.raises(ModelError, match=rf"Fisher 1: layer\.0 holds {value:g}; Fisher information is not"):
        merge_state_dicts([state(0), state(1)], "fisher", fisher=fisher)


def test_float8_is_refused_by_name() -> None:
    states = [state(0), state(1)]
    states[1]["bias"] = states[1]["bias"].to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match=r"bias: state 1 has torch\.float8_e4m3fn, and only"):
        merge_state_dicts(states, weight=1.0)


# --- the same bits


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_masks_follow_their_models(method: str) -> None:
    base, states = state(9, torch.bfloat16), [state(k, torch.bfloat16) for k in range(3)]
    densities, results = [0.8, 0.5, 0.3], []
    for order in itertools.permutations(range(3)):
        given = {"density": [densities[k] for k in order], "weight": 1.0, "seed": 3}
        results.append(merge_state_dicts([states[k] for k in order], method, base=base, **given))
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("equal", ["states", "states and their Fishers of one tensor"])
def test_fisher_means_of_equal_states_have_the_same_bits_in_any_order(equal: str) -> None:
    states = [state(0)] * 3
    fisher = [
        {n: torch.rand(s, generator=torch.Generator().manual_seed(k)) for n, s in SHAPES.items()}
        for k in range(3)
    ]
    if equal != "states":
        fisher = [tensors | {"embed": fisher[0]["embed"]} for tensors in fisher]
    results = []
    for order in itertools.permutations(range(3)):
        given = {"fisher": [fisher[k] for k in order], "out_dtype": torch.float64}
        results.append(merge_state_dicts([states[k] for k in order], "fisher", **given))
    assert all(same(results[0], other) for other in results[1:])


def test_equal_states_of_other_densities_have_the_same_bits_in_any_order() -> None:
    base, densities, results = state(9), [0.9, 0.5, 0.2], []
    for order in itertools.permutations(range(3)):
        given = {"density": [densities[k] for k in order], "weight": 1.0, "out_dtype": torch.float64}
        results.append(merge_state_dicts([state(0)] * 3, "dare_linear", base=base, **given))
    assert all(same(results[0], other) for other in results[1:])


def test_fisher_norms_and_means_are_those_of_files_whatever_computes_them(tmp_path) -> None:
    """The floor and the scale of a Fisher decide the last bits of a mean."""
    tensors = {"a": torch.rand(700_001) * 1e-9, "b": torch.rand(5).to(torch.bfloat16)}
    save_file(tensors, tmp_path / "f.safetensors")
    file = open_fisher(tmp_path / "f.safetensors")
    for name, tensor in tensors.items():
        entry, reader = file.tensor(name), MemoryReader.of(tensor, "memory")
        for backend in ("numba", "torch", "reference"):
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert norm_and_mean(reader, name, dispatch.backend(backend)) == (entry.norm, entry.mean)
    torch.set_num_threads(1)


SMALL = {"a": (9, 7), "b": (5,)}


@pytest.mark.parametrize(
    "method", ["linear", "task_arithmetic", "ties", "dare_ties", "slerp", "fisher", "model_stock"]
)
def test_thousands_of_merges_are_those_of_fresh_calls(method: str) -> None:
    """Small tensors, changed before each call: nothing of an earlier call is left, in the result or in memory."""
    generator = torch.Generator().manual_seed(0)
    states, fisher, (base,) = (
        [{n: torch.rand(s, generator=generator) for n, s in SMALL.items()} for _ in range(count)]
        for count in (2, 2, 1)
    )
    given: dict = {"linear": {"weight": 1.0}, "slerp": {"t": 0.3}, "fisher": {"fisher": fisher}}.get(
        method, {}
    )
    given |= {"weight": 1.0} if method in ("task_arithmetic", "ties", "dare_ties") else {}
    given |= {"density": 0.6} if method in ("ties", "dare_ties") else {}
    given |= {} if method in ("linear", "fisher") else {"base": base}
    if method == "slerp":
        states = states[:1]
    out = merge_state_dicts(states, method, num_threads=1, **given)
    process, before = psutil.Process(), 0
    for step in range(2000):
        states[-1]["a"][step % 9] = torch.rand(7, generator=generator)
        out = merge_state_dicts(states, method, out=out, num_threads=1, **given)
        if step % 400 == 0:
            copies = [{n: t.clone() for n, t in one.items()} for one in states]
            assert same(out, merge_state_dicts(copies, method, num_threads=1, backend="torch", **given))
        if step == 500:
            gc.collect()
            before = process.memory_info().rss
    assert process.memory_info().rss - before < 10e6


def test_parts_of_a_merge_in_the_given_order_are_the_merge():
    generator = torch.Generator().manual_seed(0)

    def draw():
        return {name: torch.randn(40, 50, generator=generator) for name in ("a", "b")}

    states = [draw() for _ in range(5)]
    fisher = [{name: tensor**2 for name, tensor in draw().items()} for _ in states]
    whole = merge_state_dicts(states, "fisher", fisher=fisher, keep_order=True)
    measures = [measure_fisher(tensors) for tensors in fisher]

    def part(tensors, start, stop):
        return {"a": tensors["a"].reshape(-1)[start:stop]}

    parts = [
        merge_state_dicts(
            [part(state, start, start + 500) for state in states],
            "fisher",
            fisher=[part(tensors, start, start + 500) for tensors in fisher],
            fisher_measures=measures,
            keep_order=True,
        )["a"]
        for start in range(0, 2000, 500)
    ]
    assert torch.equal(torch.cat(parts), whole["a"].reshape(-1))
    alone = merge_state_dicts(
        [part(state, 0, 500) for state in states], "fisher", fisher=[part(t, 0, 500) for t in fisher]
    )
    assert not torch.equal(alone["a"], parts[0])  # norms and means of the part, not of the whole


def test_the_given_order_is_kept_when_asked_for():
    # In float64 1 + 1e16 - 1e16 is 0, and 1e16 - 1e16 + 1 is 1.
    states = [{"a": torch.tensor([value], dtype=torch.float64)} for value in (1.0, 1e16, -1e16)]
    sums = {
        order: merge_state_dicts([states[k] for k in order], weight=1.0, normalize=False, keep_order=True)[
            "a"
        ].item()
        for order in ((0, 1, 2), (1, 2, 0))
    }
    assert sums == {(0, 1, 2): 0.0, (1, 2, 0): 1.0}


def test_measures_are_of_as_many_fishers():
    states = [{"a": torch.ones(3)}, {"a": torch.zeros(3)}]
    with pytest.raises(InputError, match="1 measures for 2 Fishers"):
        merge_state_dicts(states, "fisher", fisher=states, fisher_measures=[measure_fisher(states[0])])
