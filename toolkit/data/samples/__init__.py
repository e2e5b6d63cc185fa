"""Real data sets made from packages of the package index."""
