import numpy as np
import pytest

from toolkit.evaluation.outcomes import RowOutcomes
from toolkit.rounds.outcome_files import BASE, OWN_TRAINING, OutcomeFiles


def classified(seed: int) -> RowOutcomes:
    generator = np.random.default_rng(seed)
    return RowOutcomes(
        loss=generator.random(9),
        weight=np.ones(9),
        expected=generator.integers(0, 3, 9),
        predicted=generator.integers(0, 3, 9),
    )


def assert_equal(found: RowOutcomes | None, expected: RowOutcomes) -> None:
    assert found is not None
    for name in ("loss", "weight", "expected", "predicted"):
        value, wanted = getattr(found, name), getattr(expected, name)
        if wanted is None:
            assert value is None
        else:
            assert value.dtype == wanted.dtype
            assert value.tobytes() == wanted.tobytes()


def test_what_was_written_is_read_bit_for_bit(tmp_path):
    files = OutcomeFiles(tmp_path)
    language_model = RowOutcomes(loss=np.array([0.1, np.nan, np.inf]), weight=np.array([3.0, 0.0, 7.0]))
    files.write(BASE, "en-US", classified(0))
    files.write(BASE, "fr-FR", language_model)
    assert_equal(files.read(BASE, "en-US"), classified(0))
    assert_equal(OutcomeFiles(tmp_path).read(BASE, "fr-FR"), language_model)


def test_arms_models_and_rows_are_told_apart(tmp_path):
    files = OutcomeFiles(tmp_path)
    places = [(BASE, "en-US", None), (OWN_TRAINING, "en-US", None), (OWN_TRAINING, "en-US", "fr-FR")]
    places.append((OWN_TRAINING, "fr-FR", "en-US"))
    for seed, (arm, model, rows_of) in enumerate(places):
        files.write(arm, model, classified(seed), rows_of=rows_of)
    for seed, (arm, model, rows_of) in enumerate(places):
        assert_equal(files.read(arm, model, rows_of=rows_of), classified(seed))
    assert_equal(files.read(OWN_TRAINING, "en-US", rows_of="en-US"), classified(1))
    assert files.read(OWN_TRAINING, "fr-FR") is None
    assert files.read(BASE, "de-DE") is None


def test_the_newest_outcomes_count(tmp_path):
    files = OutcomeFiles(tmp_path)
    files.write(BASE, "en-US", classified(0))
    files.write(BASE, "en-US", classified(1))
    assert_equal(files.read(BASE, "en-US"), classified(1))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["en-US.npz"]


def test_equal_outcomes_are_equal_files(tmp_path):
    """A run that was killed and resumed leaves the files of one that was not."""
    for name in ("one", "two"):
        OutcomeFiles(tmp_path / name).write(BASE, "en-US", classified(0))
    (one,), (two,) = ((tmp_path / name).rglob("*.npz") for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle"):
        OutcomeFiles(tmp_path).write(BASE, "x", RowOutcomes(loss=np.array([object()]), weight=np.ones(1)))
