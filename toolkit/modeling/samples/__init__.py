"""Real pretrained models made from packages of the package index, and tiny random ones for tests.

Torch and transformers are not needed to make them: weights are converted with numpy and written as
safetensors.
"""

from toolkit.modeling.samples.catalog import MODELS, SampleModel, make

__all__ = ["MODELS", "SampleModel", "make"]
