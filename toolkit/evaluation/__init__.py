"""Metrics of language models and classifiers."""
