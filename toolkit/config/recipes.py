"""The configuration of each recipe: one flat model a recipe, by the recipe's name on the command line."""

from toolkit.config.options import (
    AdapterOptions,
    DataOptions,
    LaunchOptions,
    ModelOptions,
    Options,
    QuantizationOptions,
    RunOptions,
    TrainingOptions,
)


class CentralizedConfig(
    ModelOptions, AdapterOptions, QuantizationOptions, DataOptions, TrainingOptions, LaunchOptions, RunOptions
):
    """Train one model on all the data, in one place."""


RECIPES: dict[str, type[Options]] = {"centralized-hf": CentralizedConfig}
"""Configuration class of each recipe."""
