"""Locales, ISO 639-3, and how alike two languages are.

Everything comes from a data file of the package: no network, no torch, no other package than numpy.
"""

from toolkit.languages.codes import iso639_3
from toolkit.languages.measures import FEATURES, distance, similarity, similarity_matrix

__all__ = ["FEATURES", "distance", "iso639_3", "similarity", "similarity_matrix"]
