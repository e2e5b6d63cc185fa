"""The Fisher information of every model of a merge: the files that a recipe names, compared with their models."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from toolkit.errors import ModelError
from toolkit.merging.fisher_files import FisherFile, open_fisher
from toolkit.merging.group import FisherTensor, Reader
from toolkit.merging.recipes.model_inputs import ModelInput
from toolkit.merging.recipes.recipe import ModelReference
from toolkit.merging.recipes.vocabulary import Alignment, has_row_for_each_token


class FisherInputs:
    """Opens each file once.

    Args:
        inputs: every model.
        alignment: of different vocabularies.

    Attributes:
        files: by the path that the recipe gives.
        uncovered: the tensors that a file does not cover, by its path.
    """

    def __init__(self, inputs: Mapping[ModelReference, ModelInput], alignment: Alignment | None) -> None:
        self.files: dict[str, FisherFile] = {}
        self.uncovered: dict[str, dict[str, None]] = {}
        self._inputs = inputs
        self._alignment = alignment
        self._checked: set[tuple[str, ModelReference]] = set()

    def tensors(
        self,
        name: str,
        readers: Mapping[ModelReference, Reader],
        own_names: Sequence[str],
        paths: Sequence[str],
    ) -> tuple[FisherTensor | None, ...]:
        """The Fisher of one tensor in each model, its rows in the order of the result's vocabulary.

        Mean and norms stay those of the model's own tensor.

        Args:
            name: in the result.
            readers: the tensor of each model, as it lies in its file.
            own_names: in each model.
            paths: each model's file.

        Raises:
            ModelError: a file is missing or unsound, or of another model.
        """
        found: dict[ModelReference, FisherTensor] = {}
        for model, own_name, path in zip(readers, own_names, paths, strict=True):
            entry = self._file(path, model).tensor(self._inputs[model].actual_name(own_name))
            if entry is None:
                self.uncovered.setdefault(path, {})[name] = None
            else:
                found[model] = entry
        if self._alignment is not None and has_row_for_each_token(name):
            own = {model: entry.reader for model, entry in found.items()}
            aligned = self._alignment.aligned_fisher(name, readers, own)
            found = {model: replace(entry, reader=aligned[model]) for model, entry in found.items()}
        return tuple(found.get(model) for model in readers)

    def _file(self, path: str, model: ModelReference) -> FisherFile:
        if path not in self.files:
            file = Path(path).expanduser()
            if not file.exists():
                raise ModelError(f"there is no Fisher file {path}", hint="meldkit fisher makes it")
            self.files[path] = open_fisher(file)
        if (path, model) not in self._checked:
            self._checked.add((path, model))
            readers = {name: self._inputs[model].reader(name) for name in self.files[path].names()}
            self.files[path].check({name: tuple(r.shape) for name, r in readers.items() if r is not None})
        return self.files[path]
