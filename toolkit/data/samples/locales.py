"""The locales of the intent data, in MASSIVE's codes where it has them, and the templates behind them."""

HOME_ASSISTANT = {
    "af-ZA": "af",
    "ar-SA": "ar",
    "bg-BG": "bg",
    "bn-BD": "bn",
    "ca-ES": "ca",
    "cs-CZ": "cs",
    "cy-GB": "cy",
    "da-DK": "da",
    "de-CH": "de-CH",
    "de-DE": "de",
    "el-GR": "el",
    "en-US": "en",
    "es-ES": "es",
    "et-EE": "et",
    "eu-ES": "eu",
    "fa-IR": "fa",
    "fi-FI": "fi",
    "fr-FR": "fr",
    "ga-IE": "ga",
    "gl-ES": "gl",
    "gu-IN": "gu",
    "he-IL": "he",
    "hi-IN": "hi",
    "hr-HR": "hr",
    "hu-HU": "hu",
    "hy-AM": "hy",
    "id-ID": "id",
    "is-IS": "is",
    "it-IT": "it",
    "ja-JP": "ja",
    "ka-GE": "ka",
    "kn-IN": "kn",
    "ko-KR": "ko",
    "kw-GB": "kw",
    "lb-LU": "lb",
    "lt-LT": "lt",
    "lv-LV": "lv",
    "ml-IN": "ml",
    "mn-MN": "mn",
    "ms-MY": "ms",
    "nb-NO": "nb",
    "ne-NP": "ne",
    "nl-NL": "nl",
    "pa-IN": "pa",
    "pl-PL": "pl",
    "pt-BR": "pt-BR",
    "pt-PT": "pt",
    "ro-RO": "ro",
    "ru-RU": "ru",
    "sk-SK": "sk",
    "sl-SL": "sl",  # MASSIVE's own code for Slovenian
    "sr-Latn": "sr-Latn",
    "sr-RS": "sr",
    "sv-SE": "sv",
    "sw-KE": "sw",
    "ta-IN": "ta",
    "te-IN": "te",
    "th-TH": "th",
    "tr-TR": "tr",
    "uk-UA": "uk",
    "ur-PK": "ur",
    "vi-VN": "vi",
    "zh-CN": "zh-CN",
    "zh-HK": "zh-HK",
    "zh-TW": "zh-TW",
}
"""Locale to the language code of Home Assistant's templates."""

OURS = {"sq-AL": "sq"}
"""Locale to the templates that were written for meldkit."""

LOCALES = {**HOME_ASSISTANT, **OURS}

DEFAULT_LOCALES = ("de-DE", "en-US", "es-ES", "fr-FR", "it-IT", "nl-NL", "pl-PL", "pt-PT", "sq-AL", "sv-SE")
"""What is made without --locales: ten locales whose rooms and devices have names in their own language."""

# fmt: off
DECIMAL_POINT = frozenset([
    "bn", "cy", "de-CH", "en", "ga", "gu", "he", "hi", "ja", "kn", "ko", "kw", "ml", "mn", "ms", "ne", "pa",
    "sw", "ta", "te", "th", "ur", "zh-CN", "zh-HK", "zh-TW",
])
# fmt: on
"""Languages that write 21.5; the others write 21,5."""
