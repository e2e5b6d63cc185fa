"""Make toolkit/languages/data/uriel.npz from the wheel of lang2vec: python scripts/make_uriel_slice.py [--out FILE]

The wheel is fetched with pip and checked; its arrays are read from its files, and lang2vec itself is neither installed
nor imported (its import asks for an old setuptools). What is kept, and how it is written, stands in
toolkit/languages/uriel.py. The same wheel gives the same arrays again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from toolkit.languages.codes import ISO_639_3_OF_1  # noqa: E402 - the checkout is on the path only now
from toolkit.wheels import Wheel, unpacked  # noqa: E402 - the checkout is on the path only now

LANG2VEC = Wheel(
    package="lang2vec",
    version="1.1.2",
    sha256="bc43eddce15175ee1561c8a0566f56e42019d5987ea6c2890770a1b5d1f48fa4",
    num_bytes=10_165_378,
    licence="CC-BY-SA-4.0",
    members=tuple(
        f"lang2vec/data/{name}.npz"
        for name in ("feature_predictions", "feature_averages", "family_features", "geocoord_features")
    ),
)
DEFAULT_OUTPUT = ROOT / "toolkit" / "languages" / "data" / "uriel.npz"
LEAST_NORM = 0.99
"""Of a place fitted to distances: one for each language with coordinates, near zero where it has none."""


def table(folder: Path, name: str) -> tuple[list[str], list[str], np.ndarray]:
    """Languages, features and values [languages, features] of one file of the wheel."""
    with np.load(folder / "lang2vec" / "data" / f"{name}.npz", allow_pickle=False) as arrays:
        return list(map(str, arrays["langs"])), list(map(str, arrays["feats"])), arrays["data"][:, :, 0]


def rows_of(languages: list[str], wanted: list[str], values: np.ndarray) -> np.ndarray:
    number = {language: i for i, language in enumerate(languages)}
    return values[[number[language] for language in wanted]]


def positions(features: list[str], distances: np.ndarray) -> np.ndarray:
    """Latitude and longitude in degrees from great-circle distances to fixed points.

    cos(pi d_i) = p_i . x for a unit vector x: linear least squares over the points p_i.

    Args:
        features: ``GC_latitude_longitude`` of each point, in degrees.
        distances: [languages, points], as a fraction of half the earth's circumference.

    Returns:
        [languages, 2] float64.
    """
    points = np.radians([[float(part) for part in feature.split("_")[1:]] for feature in features])
    latitude, longitude = points.T
    unit = np.stack(
        [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], 1
    )
    fitted = np.linalg.lstsq(unit, np.cos(np.pi * distances.astype(np.float64)).T, rcond=None)[0].T
    norm = np.linalg.norm(fitted, axis=1)
    assert norm.min() > LEAST_NORM, "a language without coordinates"
    x, y, z = (fitted / norm[:, None]).T
    return np.degrees(np.stack([np.arcsin(z), np.arctan2(y, x)], 1))


def make_slice(folder: Path) -> dict[str, Any]:
    """The arrays of the data file, by name."""
    languages, features, averages = table(folder, "feature_averages")
    also, same, predictions = table(folder, "feature_predictions")
    assert (also, same) == (languages, features)
    known = averages >= 0
    named = set(ISO_639_3_OF_1.values())
    kept = sorted(code for code, row in zip(languages, known, strict=True) if row.any() or code in named)
    averages, predictions = rows_of(languages, kept, averages), rows_of(languages, kept, predictions)
    levels, codes = np.unique(averages, return_inverse=True)
    assert levels[0] == -1
    assert len(levels) < 256

    family_languages, _, families = table(folder, "family_features")
    members = rows_of(family_languages, kept, families) > 0
    used = members.any(axis=0)
    geo_languages, points, distances = table(folder, "geocoord_features")
    places = positions(points, rows_of(geo_languages, kept, distances))
    return {
        "languages": np.array(kept, dtype="S3"),
        "features": np.array(features, dtype="S"),
        "predicted": np.packbits(predictions > 0.5, axis=1),
        "average_levels": levels,
        "average_codes": codes.reshape(averages.shape).astype(np.uint8),
        "num_families": members.sum(axis=1).astype(np.uint8),
        "families": np.nonzero(members[:, used])[1].astype(np.uint16),
        "position_hundredths": np.round(places * 100).astype(np.int16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUTPUT)
    output = parser.parse_args().out
    arrays = make_slice(unpacked(LANG2VEC, announce=print))
    output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(output, **arrays)
    print(f"{output}: {len(arrays['languages'])} languages, {output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
