"""Which rows are trained and which are held out, classification, the cache, and the fingerprint."""

import json
import multiprocessing

import pytest

import toolkit.data.prepare
from toolkit import durable
from toolkit.data import cache
from toolkit.data.identity import rows_sha256
from toolkit.data.prepare import prepare
from toolkit.data.selection import hold_out
from toolkit.errors import DataError

INTENTS = [
    {"utt": f"{verb} the {thing} {n}", "intent": intent, "locale": locale}
    for n in range(3)
    for verb, intent in (("start", "on"), ("stop", "off"))
    for thing, locale in (("lamp", "en-US"), ("lampe", "de-DE"))
]


@pytest.fixture
def chats(make_chat):
    return [make_chat(f"question {n}", f"answer {n}") for n in range(20)]


@pytest.fixture
def prepared(options, tokenizer):
    def run(data, task="causal-lm", seed=0, **values):
        return prepare(options(data=str(data), **values), tokenizer, task, seed=seed)

    return run


# which rows


def test_no_held_out_rows_unless_asked_for(prepared, write_jsonl, chats):
    assert prepared(write_jsonl(chats)).evaluation is None


@pytest.mark.parametrize("name", ["validation", "valid", "eval", "dev", "test"])
def test_a_held_out_split_is_found_by_its_name(prepared, write_jsonl, chats, tmp_path, name):
    write_jsonl(chats[:15], "folder/train.jsonl")
    write_jsonl(chats[15:], f"folder/{name}.jsonl")
    result = prepared(tmp_path / "folder")
    assert (len(result.train), len(result.evaluation)) == (15, 5)


def test_validation_comes_before_test_and_options_before_both(prepared, write_jsonl, chats, tmp_path):
    write_jsonl(chats[:10], "folder/train.jsonl")
    write_jsonl(chats[10:13], "folder/validation.jsonl")
    write_jsonl(chats[13:15], "folder/test.jsonl")
    other = write_jsonl(chats[15:19], "other.jsonl")
    assert len(prepared(tmp_path / "folder").evaluation) == 3
    assert len(prepared(tmp_path / "folder", eval_split="test").evaluation) == 2
    assert len(prepared(tmp_path / "folder", eval_data=other).evaluation) == 4


def test_a_fraction_by_seed(prepared, write_jsonl, chats):
    data = write_jsonl(chats)
    first, again, other = (prepared(data, seed=seed, eval_fraction=0.25) for seed in (1, 1, 2))
    assert (len(first.train), len(first.evaluation)) == (15, 5)
    assert first.evaluation["input_ids"] == again.evaluation["input_ids"]
    assert first.evaluation["input_ids"] != other.evaluation["input_ids"]
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_fraction_never_parts_equal_rows(prepared, write_jsonl, make_chat):
    rows = [make_chat(f"q {n % 5}", "a") for n in range(20)]
    result = prepared(write_jsonl(rows), eval_fraction=0.3, skip_data_check=True)
    assert result.report.num_leaked_rows == 0
    assert len(result.evaluation) % 4 == 0
    with pytest.raises(DataError, match="at least two different rows"):
        prepared(write_jsonl([make_chat("q", "a")] * 3), eval_fraction=0.3)


@pytest.mark.parametrize("seed", range(4))
def test_a_fraction_leaves_training_rows_and_takes_no_group_that_is_too_large(seed):
    assert sorted(len(part) for part in hold_out([b"a", b"b"], 0.9, seed)) == [1, 1]
    digests = [b"large"] * 50 + [bytes([n]) for n in range(50)]
    train, held_out = hold_out(digests, 0.2, seed)
    assert sorted(train + held_out) == list(range(100))
    # The first group that is drawn is taken whatever its size: otherwise nothing might be held out.
    assert len(held_out) in (20, 50)


def test_first_rows_and_one_locale(prepared, write_jsonl, chats):
    assert len(prepared(write_jsonl(chats), max_rows=7).train) == 7
    data = write_jsonl(INTENTS, "intents.jsonl")
    task = "sequence-classification"
    assert len(prepared(data, task, locale="de_de").train) == 6
    with pytest.raises(DataError, match="no rows of the locale fr-FR") as error:
        prepared(data, task, locale="fr-FR")
    assert "de-DE, en-US" in str(error.value)
    with pytest.raises(DataError, match="no column named locale"):
        prepared(write_jsonl(chats), locale="de-DE")


def test_split_names_of_a_single_file(prepared, write_jsonl, chats):
    with pytest.raises(DataError, match="has no named splits, and --train-split asks for 'all'"):
        prepared(write_jsonl(chats), train_split="all")


# what comes out


def test_columns_and_longest(prepared, write_jsonl, chats):
    result = prepared(write_jsonl(chats), eval_fraction=0.2)
    assert set(result.train.column_names) == {"input_ids", "labels", "length"}
    assert result.longest == max(
        len(row["input_ids"]) for part in (result.train, result.evaluation) for row in part
    )
    packed = prepared(write_jsonl(chats), eval_fraction=0.2, packing=True, max_length=64)
    assert set(packed.train.column_names) == {"input_ids", "labels", "position_ids", "seq_lengths", "length"}
    assert len(packed.evaluation) == 4, "held-out rows are never packed"
    assert all(row["seq_lengths"] == [row["length"]] for row in packed.evaluation)


def test_classes_are_those_of_the_training_data_sorted(prepared, write_jsonl, tokenizer):
    data = write_jsonl(INTENTS)
    result = prepared(data, "sequence-classification")
    assert result.label_names == ["off", "on"]
    assert result.train["labels"] == [result.label_names.index(row["intent"]) for row in INTENTS]
    assert result.train[0]["input_ids"] == tokenizer(INTENTS[0]["utt"]).input_ids
    assert result.report.train.label_counts == {"off": 6, "on": 6}
    numbers = write_jsonl([{"text": f"t{n}", "label": n} for n in (10, 9, 2)], "numbers.jsonl")
    assert prepared(numbers, "sequence-classification").label_names == ["2", "9", "10"]


def test_a_class_that_training_does_not_have(prepared, write_jsonl):
    held_out = write_jsonl([*INTENTS[:1], {"utt": "x", "intent": "dim"}], "held_out.jsonl")
    with pytest.raises(DataError, match=r"held_out.jsonl:2: the label 'dim' is not in the training data"):
        prepared(write_jsonl(INTENTS), "sequence-classification", eval_data=held_out, skip_data_check=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"overlong": "split"}, "--overlong split cannot be used for sequence classification"),
        ({"packing": True}, "--packing is for language models"),
        ({"max_length": 8}, r"rows are longer than --max-length 8"),
    ],
)
def test_what_a_classifier_cannot_have(prepared, write_jsonl, values, message):
    rows = [*INTENTS, {"utt": "a very long sentence with far too many words in it", "intent": "on"}]
    with pytest.raises(DataError, match=message):
        prepared(write_jsonl(rows), "sequence-classification", **values)


def test_one_class_is_none(prepared, write_jsonl):
    with pytest.raises(DataError, match=r"has 1 class \(on\); at least two are needed"):
        prepared(write_jsonl([r for r in INTENTS if r["intent"] == "on"]), "sequence-classification")


def test_cut_texts_keep_the_special_tokens_at_their_end(options, write_jsonl, make_tokenizer):
    tokenizer = make_tokenizer(None, adds_bos=True)
    rows = [{"text": "word " * 30, "label": "a"}, {"text": "short", "label": "b"}]
    config = options(data=write_jsonl(rows), max_length=16, overlong="truncate", skip_data_check=True)
    result = prepare(config, tokenizer, "sequence-classification", seed=0)
    assert len(result.train[0]["input_ids"]) == 16
    assert result.train[0]["input_ids"][0] == tokenizer.bos_token_id
    assert result.report.train.overlong["num_rows_cut"] == 1


# the check stops


def test_leaks_stop_unless_allowed(prepared, write_jsonl, chats, make_chat):
    leak = make_chat("QUESTION  1", "answer 1\n")
    held_out = write_jsonl([make_chat("x", "y"), leak], "held_out.jsonl")
    data = write_jsonl(chats)
    with pytest.raises(
        DataError, match=r"1 of 2 held-out rows are in the training data too, 50.0 %.*held_out.jsonl:2"
    ):
        prepared(data, eval_data=held_out)
    assert prepared(data, eval_data=held_out, max_leaks=0.5).report.problems == []
    assert len(prepared(data, eval_data=held_out, skip_data_check=True).report.problems) == 1


def test_duplicates_and_a_small_trained_share_stop(prepared, write_jsonl, make_chat):
    with pytest.raises(DataError, match=r"9 of 10 training rows repeat an earlier row, 90\.0 %"):
        prepared(write_jsonl([make_chat("a", "b")] * 10))
    with pytest.raises(DataError, match=r"only 0\.\d\d % of the training tokens are trained"):
        prepared(write_jsonl([make_chat("long " * 200, "b")]), min_trainable_share=0.01)


# the cache


def entries(folder):
    return [path for path in (folder / "cache" / "tokenised").iterdir() if not path.name.startswith(".")]


@pytest.fixture
def builds(monkeypatch):
    """One entry for each time that rows are tokenised anew."""
    done = []

    def build(*arguments):
        done.append(arguments)
        return real(*arguments)

    real = toolkit.data.prepare._build
    monkeypatch.setattr(toolkit.data.prepare, "_build", build)
    return done


def test_the_second_time_comes_from_the_cache_and_is_the_same(prepared, write_jsonl, chats, tmp_path, builds):
    data = write_jsonl(chats)
    first, second = (prepared(data, eval_fraction=0.2, packing=True, max_length=64) for _ in range(2))
    assert len(builds) == 1
    assert first.train[:] == second.train[:]
    assert first.evaluation[:] == second.evaluation[:]
    assert first.report.as_dict() == second.report.as_dict()
    assert (first.longest, first.fingerprint) == (second.longest, second.fingerprint)
    assert len(entries(tmp_path)) == 1


def test_what_changes_the_rows_changes_the_entry(
    prepared, options, write_jsonl, chats, make_tokenizer, builds
):
    data = write_jsonl(chats)
    prepared(data)
    for values in (
        {"max_length": 100},
        {"loss_on": "all"},
        {"packing": True},
        {"overlong": "drop"},
        {"max_rows": 5},
    ):
        prepared(data, **values)
    prepare(options(data=data), make_tokenizer("chatml-marks"), "causal-lm", seed=0)
    write_jsonl([*chats[1:], chats[0]])
    prepared(data)
    assert len(builds) == 8
    write_jsonl(chats)
    prepared(data, skip_data_check=True, max_leaks=0.5)
    assert len(builds) == 8, "thresholds change nothing"


def test_every_module_of_the_folder_belongs_to_the_key(monkeypatch, tmp_path):
    for name in ("cache.py", "encode.py"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    hashes = {cache.code_sha256()}
    (tmp_path / "encode.py").write_text("changed")
    hashes.add(cache.code_sha256())
    (tmp_path / "new.py").write_text("")
    hashes.add(cache.code_sha256())
    assert len(hashes) == 3


def test_the_fingerprint_is_of_the_tokens_and_labels(prepared, write_jsonl, chats):
    data = write_jsonl(chats, "a.jsonl")
    result = prepared(data, eval_fraction=0.2)
    expected = rows_sha256(result.train, result.evaluation)
    again = prepared(data, eval_fraction=0.2)  # from the cache
    elsewhere = prepared(write_jsonl(chats, "b.jsonl"), eval_fraction=0.2, max_length=1000, overlong="drop")
    for same in (result, again, elsewhere):
        assert same.fingerprint == same.report.fingerprint == expected
    assert prepared(data, eval_fraction=0.2, loss_on="all").fingerprint != expected
    assert prepared(data).fingerprint != expected


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["change", "delete", "cut", "manifest"])
def test_a_damaged_entry_is_built_again(prepared, write_jsonl, chats, tmp_path, damage, builds):
    data = write_jsonl(chats)
    expected = prepared(data).train[:]
    entry = entries(tmp_path)[0]
    victim = entry / ("manifest.json" if damage == "manifest" else "train.arrow")
    content = victim.read_bytes()
    if damage == "delete":
        victim.unlink()
    elif damage == "cut":
        victim.write_bytes(content[:-7])
    else:
        victim.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    result = prepared(data)
    assert len(builds) == 2
    assert result.train[:] == expected
    prepared(data)
    assert len(builds) == 2


@pytest.mark.faults
def test_a_cache_that_cannot_be_written_is_noted_and_not_needed(prepared, write_jsonl, chats, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = prepared(write_jsonl(chats), data_cache=tmp_path / "file")
    assert len(result.train) == 20
    assert any("cannot be written" in note for note in result.report.notes)


def test_leftovers_of_a_killed_process_go_when_they_are_old(prepared, write_jsonl, chats, tmp_path):
    import os
    import time

    folder = tmp_path / "cache" / "tokenised"
    for name in ("old", "new"):
        (folder / f"{durable.STAGING_PREFIX}{name}").mkdir(parents=True)
    past = time.time() - 2 * cache.LEFTOVER_AGE_SECONDS
    os.utime(folder / f"{durable.STAGING_PREFIX}old", (past, past))
    prepared(write_jsonl(chats))
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert left == [f"{durable.STAGING_PREFIX}new"]


def _store(folder, barrier, queue):
    import datasets

    data = datasets.Dataset.from_dict({"x": list(range(1000))})
    barrier.wait()
    entry = cache.store(folder, "k" * 64, {"train": data}, {"n": 1})
    loaded = cache.load(entry, "train")
    queue.put(loaded is not None and loaded["x"] == list(range(1000)))


def test_two_processes_may_store_the_same_entry_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_store, args=(tmp_path, barrier, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert results == [True, True]
    assert [path.name for path in tmp_path.iterdir()] == ["k" * 64]


def test_the_report_goes_to_json_and_back(prepared, write_jsonl, chats):
    from toolkit.data.check import CheckReport

    report = prepared(write_jsonl(chats), eval_fraction=0.2).report
    value = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert CheckReport.from_dict(value).as_dict() == report.as_dict()
    assert value["train"]["trained_share"] > 0
