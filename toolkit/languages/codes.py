"""A locale's language as ISO 639-3, the key of the typological data."""

import difflib
import re
from collections.abc import Iterable

from toolkit.errors import InputError
from toolkit.languages import uriel

_TWO_LETTERS = """
    aa:aar ab:abk ae:ave af:afr ak:aka am:amh an:arg ar:ara as:asm av:ava ay:aym az:aze ba:bak be:bel bg:bul bi:bis
    bm:bam bn:ben bo:bod br:bre bs:bos ca:cat ce:che ch:cha co:cos cr:cre cs:ces cu:chu cv:chv cy:cym da:dan de:deu
    dv:div dz:dzo ee:ewe el:ell en:eng eo:epo es:spa et:est eu:eus fa:fas ff:ful fi:fin fj:fij fo:fao fr:fra fy:fry
    ga:gle gd:gla gl:glg gn:grn gu:guj gv:glv ha:hau he:heb hi:hin ho:hmo hr:hrv ht:hat hu:hun hy:hye hz:her ia:ina
    id:ind ie:ile ig:ibo ii:iii ik:ipk io:ido is:isl it:ita iu:iku ja:jpn jv:jav ka:kat kg:kon ki:kik kj:kua kk:kaz
    kl:kal km:khm kn:kan ko:kor kr:kau ks:kas ku:kur kv:kom kw:cor ky:kir la:lat lb:ltz lg:lug li:lim ln:lin lo:lao
    lt:lit lu:lub lv:lav mg:mlg mh:mah mi:mri mk:mkd ml:mal mn:mon mr:mar ms:msa mt:mlt my:mya na:nau nb:nob nd:nde
    ne:nep ng:ndo nl:nld nn:nno no:nor nr:nbl nv:nav ny:nya oc:oci oj:oji om:orm or:ori os:oss pa:pan pi:pli pl:pol
    ps:pus pt:por qu:que rm:roh rn:run ro:ron ru:rus rw:kin sa:san sc:srd sd:snd se:sme sg:sag sh:hbs si:sin sk:slk
    sl:slv sm:smo sn:sna so:som sq:sqi sr:srp ss:ssw st:sot su:sun sv:swe sw:swa ta:tam te:tel tg:tgk th:tha ti:tir
    tk:tuk tl:tgl tn:tsn to:ton tr:tur ts:tso tt:tat tw:twi ty:tah ug:uig uk:ukr ur:urd uz:uzb ve:ven vi:vie vo:vol
    wa:wln wo:wol xh:xho yi:yid yo:yor za:zha zh:zho zu:zul
"""
ISO_639_3_OF_1 = {pair[:2]: pair[3:] for pair in _TWO_LETTERS.split()}
"""ISO 639-1 to ISO 639-3, of the language or of the macrolanguage."""
RENAMED = {"iw": "heb", "in": "ind", "ji": "yid", "jw": "jav", "mo": "ron"}
"""Codes of ISO 639-1 that were withdrawn and still turn up."""
_CATALOGUES = """
    alb:sqi arm:hye baq:eus bur:mya chi:zho cze:ces dut:nld fre:fra geo:kat ger:deu gre:ell ice:isl mac:mkd mao:mri
    may:msa per:fas rum:ron slo:slk tib:bod wel:cym
"""
BIBLIOGRAPHIC = {pair[:3]: pair[4:] for pair in _CATALOGUES.split()}
"""ISO 639-2's codes for library catalogues."""
MACROLANGUAGE = {"ory": "ori", "pbt": "pus", "zlm": "msa"}
"""Languages that the data holds under the macrolanguage only."""

LOCALE = re.compile(
    r"(?P<language>[a-z]{2,3})(?:[-_][a-z]{4})?(?:[-_](?:[a-z]{2}|[0-9]{3}))?",
    re.IGNORECASE,
)
NUM_SUGGESTIONS = 3


def iso639_3(locale: str) -> str:
    """The language of a locale as ISO 639-3: sq-AL → sqi, sr-Latn and sr-RS → srp, zh_TW → zho.

    Script and region are checked for their form and do not change the language: the data knows languages, not how they
    are written. ``zh-HK`` is Chinese, Cantonese is ``yue-HK``. Case does not count.

    Raises:
        InputError: no locale (``language[-Script][-REGION]``), or a language that the data lacks; the nearest codes
            that it has are named.
    """
    found = LOCALE.fullmatch(locale)
    if found is None:
        raise InputError(
            f"{locale!r} is no locale", hint="language[-Script][-REGION], such as sq-AL, en-US or sr-Latn"
        )
    language = found["language"].lower()
    known = uriel.load().number
    for table in (ISO_639_3_OF_1, RENAMED, BIBLIOGRAPHIC, MACROLANGUAGE):
        language = table.get(language, language)
    if language not in known:
        near = _nearest(language, ISO_639_3_OF_1 if len(language) == 2 else known)
        raise InputError(
            f"{locale!r}: the typological data (URIEL) has no language {language!r}",
            hint=f"the nearest codes that it has: {', '.join(near)}" if near else None,
        )
    return language


def _nearest(code: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(code, sorted(known), n=NUM_SUGGESTIONS, cutoff=0.5)
