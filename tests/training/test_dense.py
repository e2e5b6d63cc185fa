"""Micro-batches of a dense step: the same rows, at the least cost, within the capacity."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.training.dense import Costs, DenseCollator, plan_groups
from toolkit.training.row_attention import Rows, use_row_attention


def cost_of(groups, lengths, costs):
    """The cost by its definition; infinite where a group does not fit."""
    total = 0.0
    for rows, is_flat in groups:
        own = [lengths[row] for row in rows]
        padded, longest, num_tokens = len(own) * max(own), max(own), sum(own)
        size = num_tokens if is_flat else padded
        if len(own) > 1 and size > (min(costs.flat, costs.capacity) if is_flat else costs.capacity):
            return float("inf")
        pairs = padded * longest if not is_flat or costs.is_row_wise else num_tokens**2
        total += costs.batch + size + costs.pair * pairs
    return total


def cheapest(lengths, costs):
    """The least cost over all ways to cut the sorted rows, each group padded or flat."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    best = float("inf")
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        borders = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(order)]
        parts = [order[a:b] for a, b in itertools.pairwise(borders)]
        for flats in itertools.product([False, True], repeat=len(parts)):
            if any(flat and len(part) == 1 for flat, part in zip(flats, parts, strict=True)):
                continue
            best = min(best, cost_of(list(zip(parts, flats, strict=True)), lengths, costs))
    return best


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    pair=st.sampled_from([0.0, 1e-3, 0.05]),
    batch=st.sampled_from([0, 8, 100]),
    capacity=st.integers(40, 120),
    flat=st.sampled_from([0, 60, 200]),
    is_row_wise=st.booleans(),
)
def test_the_cut_is_the_cheapest_one(lengths, pair, batch, capacity, flat, is_row_wise):
    costs = Costs(pair=pair, batch=batch, capacity=capacity, flat=flat, is_row_wise=is_row_wise)
    groups = plan_groups(lengths, costs)
    assert sorted(row for group in groups for row in group.rows) == list(range(len(lengths)))
    made = cost_of([(group.rows, group.is_flat) for group in groups], lengths, costs)
    assert made == pytest.approx(cheapest(lengths, costs))


def rows_of(*lengths):
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in lengths:
        ids = torch.randint(4, 64, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return made


@pytest.mark.parametrize("flat", [0, 1000])
def test_micro_batches_hold_every_row_once(flat):
    rows = rows_of(9, 30, 12, 31, 5, 12)
    costs = Costs(pair=0.0, batch=4, capacity=64, flat=flat, is_row_wise=True)
    batch = DenseCollator(0, costs, tells_rows=True)(rows)
    assert batch["input_ids"].shape == (1, 99)
    found = []
    for micro in batch["layout"].micro_batches(batch):
        assert micro["input_ids"].numel() <= 64
        if "rows" in micro:
            starts = (micro["position_ids"][0] == 0).nonzero().flatten().tolist()
            pieces = list(itertools.pairwise([*starts, micro["input_ids"].shape[1]]))
            found += [(micro["input_ids"][0, a:b], micro["labels"][0, a:b]) for a, b in pieces]
        else:
            masks = micro.get("attention_mask", torch.ones_like(micro["input_ids"])).bool()
            found += [
                (ids[mask], labels[mask])
                for ids, labels, mask in zip(micro["input_ids"], micro["labels"], masks, strict=True)
            ]
            assert (micro["labels"][~masks] == -100).all()
    expected = sorted((row["input_ids"], row["labels"][1:]) for row in rows)
    assert sorted((ids.tolist(), labels[1:].tolist()) for ids, labels in found) == expected
    assert all(int(labels[0]) == -100 for _, labels in found)


def test_rows_in_one_sequence_get_the_logits_of_each_alone(make_model):
    model = make_model().eval()
    rows = [torch.tensor(row["input_ids"]) for row in rows_of(7, 19, 3)]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
        assert use_row_attention(model)
        told = {"rows": Rows([7, 19, 3], torch.device("cpu"))}
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        together = model(input_ids=torch.cat(rows)[None], position_ids=positions, **told).logits[0]
    assert torch.allclose(together, alone, atol=1e-5)


def test_row_attention_without_rows_is_sdpa_to_the_bit(make_model):
    ids = torch.randint(4, 64, (2, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    logits = []
    for switch in (False, True):
        model = make_model().eval()
        if switch:
            assert use_row_attention(model)
        logits.append(model(input_ids=ids, attention_mask=mask).logits)
    assert torch.equal(*logits)


def test_a_window_shorter_than_a_row_is_kept():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=4, **small)
    model = MistralForCausalLM(config).eval()
    rows = [torch.tensor(row["input_ids"]) for row in rows_of(13, 9)]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
        assert use_row_attention(model)
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        told = {"rows": Rows([13, 9], torch.device("cpu"))}
        joined = model(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False, **told)
    assert torch.allclose(joined.logits[0], alone, atol=1e-5)
