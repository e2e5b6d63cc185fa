"""The shipped slice of URIEL: what it holds, its licence, and that the script makes it."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from toolkit.errors import MeldkitError
from toolkit.languages import uriel
from toolkit.wheels import unpacked

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "toolkit" / "languages" / "data"


def the_script() -> ModuleType:
    path = ROOT / "scripts" / "make_uriel_slice.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_data_is_small_and_has_its_own_licence() -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 200_000
    assert "Attribution-ShareAlike 4.0 International" in (DATA / "LICENSE").read_text(encoding="utf-8")
    attribution = (DATA / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "CC-BY-SA-4.0" in attribution
    assert "lang2vec 1.1.2" in attribution
    assert f"{len(uriel.load().number)} of 7970 languages" in attribution


def test_every_language_has_predictions_and_a_place() -> None:
    data = uriel.load()
    assert list(data.number) == sorted(data.number)
    num_languages = len(data.number)
    assert data.predicted.shape == data.average.shape == (num_languages, len(data.features))
    assert len(data.families) == len(data.positions) == num_languages
    for prefix in ("S_", "P_", "INV_"):
        columns = [i for i, name in enumerate(data.features) if name.startswith(prefix)]
        assert data.predicted[:, columns].any(axis=1).all()
    latitude, longitude = np.degrees(data.positions).T
    assert np.abs(latitude).max() <= 90
    assert np.abs(longitude).max() <= 180


def test_no_hole_is_filled() -> None:
    data = uriel.load()
    english = data.average[data.number["eng"]]
    filipino = data.average[data.number["fil"]]
    syntax = [i for i, name in enumerate(data.features) if name.startswith("S_")]
    assert not np.isnan(english[syntax]).any()
    assert np.isnan(filipino[syntax]).all()
    assert np.nanmin(data.average) == 0
    assert np.nanmax(data.average) == 1


@pytest.mark.slow
def test_the_script_makes_the_file_from_the_wheel() -> None:
    script = the_script()
    try:
        folder = unpacked(script.LANG2VEC)
    except MeldkitError as error:
        pytest.skip(f"the wheel of lang2vec cannot be fetched: {error}")
    made = script.make_slice(folder)
    with np.load(DATA / "uriel.npz", allow_pickle=False) as shipped:
        assert set(shipped.files) == set(made)
        for name, array in made.items():
            np.testing.assert_array_equal(shipped[name], array, err_msg=name)
    # Places fit the distances they were made from: the earth is no sphere, so to half a percent.
    languages, points, distances = script.table(folder, "geocoord_features")
    data = uriel.load()
    rows = script.rows_of(languages, list(data.number), distances)
    place = np.radians([[float(part) for part in point.split("_")[1:]] for point in points])
    for row in range(0, len(rows), 97):
        latitude, longitude = data.positions[row]
        cosine = np.sin(latitude) * np.sin(place[:, 0]) + np.cos(latitude) * np.cos(place[:, 0]) * np.cos(
            longitude - place[:, 1]
        )
        assert np.abs(np.arccos(np.clip(cosine, -1, 1)) / np.pi - rows[row]).max() < 0.005
