"""Real data sets made from packages of the package index."""

from toolkit.data.samples.catalog import DATA, SampleData, make

__all__ = ["DATA", "SampleData", "make"]
