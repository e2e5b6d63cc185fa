"""Locales as ISO 639-3."""

import pytest

from toolkit.config.iterative_options import LOCALE
from toolkit.data.locale_codes import LANGUAGES
from toolkit.data.samples.locales import LOCALES
from toolkit.errors import InputError
from toolkit.languages import iso639_3
from toolkit.languages.codes import ISO_639_3_OF_1

MASSIVE = """
af-ZA am-ET ar-SA az-AZ bn-BD ca-ES cy-GB da-DK de-DE el-GR en-US es-ES fa-IR fi-FI fr-FR he-IL hi-IN hu-HU hy-AM id-ID
is-IS it-IT ja-JP jv-ID ka-GE km-KH kn-IN ko-KR lv-LV ml-IN mn-MN ms-MY my-MM nb-NO nl-NL pl-PL pt-PT ro-RO ru-RU sl-SL
sq-AL sv-SE sw-KE ta-IN te-IN th-TH tl-PH tr-TR ur-PK vi-VN zh-CN zh-TW
"""


@pytest.mark.parametrize(
    ("locale", "expected"),
    [
        ("sq-AL", "sqi"),
        ("en", "eng"),
        ("EN_us", "eng"),
        ("zh-CN", "zho"),
        ("zh_TW", "zho"),
        ("zh-Hant-HK", "zho"),
        ("sr-RS", "srp"),
        ("sr-Latn", "srp"),
        ("sr_Latn_RS", "srp"),
        ("nb-NO", "nob"),
        ("no", "nor"),
        ("tl-PH", "tgl"),
        ("fil-PH", "fil"),
        ("es-419", "spa"),
        ("deu", "deu"),
        ("yue-HK", "yue"),
        ("ger", "deu"),  # of library catalogues
        ("iw", "heb"),  # withdrawn
        ("zlm", "msa"),  # held under the macrolanguage
    ],
)
def test_locales(locale: str, expected: str) -> None:
    assert iso639_3(locale) == expected


def test_all_locales_of_massive_and_of_the_sample_collection_are_known() -> None:
    assert len(MASSIVE.split()) == 52
    codes = {locale: iso639_3(locale) for locale in [*MASSIVE.split(), *LOCALES]}
    assert all(len(code) == 3 for code in codes.values())
    # Different languages stay different ones.
    assert len(set(codes.values())) == len({locale.replace("_", "-").split("-")[0] for locale in codes})


def test_every_two_letter_code_is_known() -> None:
    collective = {"bh"}  # Bihari languages: no language of ISO 639-3
    assert LANGUAGES - collective == set(ISO_639_3_OF_1)
    assert len(set(ISO_639_3_OF_1.values())) == len(ISO_639_3_OF_1)
    for code, expected in ISO_639_3_OF_1.items():
        assert iso639_3(code) == expected


@pytest.mark.parametrize(
    "locale", ["", "english", "en-USA", "en-US-", "-US", "e", "en US", "../en", "en-US.UTF-8"]
)
def test_what_is_no_locale_is_refused(locale: str) -> None:
    with pytest.raises(InputError, match="is no locale") as caught:
        iso639_3(locale)
    assert "sq-AL" in str(caught.value.hint)


@pytest.mark.parametrize("locale", ["sq-AL", "sr-Latn-RS", "fil-PH", "es-419"])
def test_what_the_options_accept_is_read(locale: str) -> None:
    assert LOCALE.fullmatch(locale)
    iso639_3(locale)


def test_an_unknown_language_names_the_nearest_ones() -> None:
    with pytest.raises(InputError, match="no language 'xq'") as caught:
        iso639_3("xq-AL")
    assert "sq" in str(caught.value.hint)
    with pytest.raises(InputError, match="no language 'enx'") as caught:
        iso639_3("enx")
    assert str(caught.value.hint).count(",") == 2
