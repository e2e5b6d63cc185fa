"""Everything of the result but weights: configuration, tokenizer, chat template, recipe, model card.

Files are copied and never run.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toolkit.config.names import did_you_mean
from toolkit.errors import ModelError
from toolkit.merging.plan import OutputTensor
from toolkit.merging.recipes.card import card
from toolkit.merging.recipes.chat_templates import TEMPLATES
from toolkit.merging.recipes.companion_files import copy_file, read_json, read_text, write
from toolkit.merging.recipes.model_inputs import ModelInput, tie_word_embeddings
from toolkit.merging.recipes.recipe import MergeRecipe, ModelReference
from toolkit.merging.recipes.slices import TEXT_CONFIGS
from toolkit.merging.recipes.tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILE, VOCABULARY_FILES
from toolkit.merging.recipes.vocabulary import EMBEDDINGS, HEADS, Unified, ends_with
from toolkit.merging.registry import MergeMethod
from toolkit_kernels.spans import CODES

RECIPE_NAME = "mergekit_config.yml"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    *VOCABULARY_FILES,
    "merges.txt",
    TEMPLATE_FILE,
    "chat_template.json",
)
GENERATION_CONFIG = "generation_config.json"
OTHER_FILES = (
    GENERATION_CONFIG,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    # of sentence-transformers
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPE_KEYS = ("dtype", "torch_dtype")
# A text of at least this length with a brace in it is a template, anything else the name of one.
MIN_TEMPLATE_LENGTH = 20


@dataclass(frozen=True)
class Companions:
    """What is written beside the weights.

    Attributes:
        donor: the model whose files are copied.
        config: config.json, with the number of layers of the result.
        unified: the tokenizer of the result, where the recipe asks for one.
        tensors: of the result.
    """

    recipe: MergeRecipe
    method: MergeMethod
    donor: ModelInput
    inputs: Mapping[ModelReference, ModelInput]
    config: Mapping[str, Any]
    unified: Unified | None
    copy_code: bool
    copy_tokenizer: bool
    write_card: bool
    tensors: list[OutputTensor]

    def notes(self) -> list[str]:
        """What the user should know; nothing is written. Raises ModelError for a chat template that there is not."""
        found = []
        template = self.chat_template
        if not self.copy_tokenizer:
            if self.recipe.tokenizer is not None or template:
                found.append("--no-copy-tokenizer: neither tokenizer nor chat template is written")
        elif not self._tokenizer_files():
            found.append(f"{self.tokenizer_folder} has no tokenizer: none is written")
            if template:
                found.append("chat_template is not written: there is no tokenizer")
        elif self.recipe.chat_template == "auto" and template is None:
            found.append("chat_template: auto: no model has a chat template")
        if self.config.get("auto_map") and not self.copy_code:
            found.append(
                "config.json names Python code (auto_map), which is not copied: --trust-remote-code copies it"
            )
        return found

    def write(self, folder: Path) -> None:
        """Write all of it into ``folder``.

        Raises:
            MergeError: a file cannot be copied.
        """
        self._write_json(folder / "config.json", self.output_config())
        origin = self.donor.source.folder
        for name in OTHER_FILES:
            copy_file(origin, name, folder)
        generation = read_json(folder / GENERATION_CONFIG)
        if self._set_token_ids(generation, "config.json", GENERATION_CONFIG):
            self._write_json(folder / GENERATION_CONFIG, generation)
        if self.copy_code and self.config.get("auto_map"):
            for path in sorted(origin.glob("*.py")):
                copy_file(origin, path.name, folder)
        if self.copy_tokenizer and self._tokenizer_files():
            self._write_tokenizer(folder)
        write(folder / RECIPE_NAME, self.recipe.text)
        if self.write_card:
            write(folder / "README.md", card(self.recipe, self.method, self.inputs))

    # --- config.json

    def output_config(self) -> dict[str, Any]:
        """config.json of the result: dtype, vocabulary, tied weights; other values are the donor's."""
        config = json.loads(json.dumps(self.config))
        config.pop("_name_or_path", None)
        dtype = self._dtype()
        parts = [
            config,
            *(part for key, part in config.items() if key.endswith("_config") and isinstance(part, dict)),
        ]
        for part in parts:
            for key in DTYPE_KEYS:
                if key in part:
                    part[key] = dtype
        if not any(key in config for key in DTYPE_KEYS):
            config["dtype"] = dtype
        text = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), config)
        self._set_vocabulary(config, text)
        has_head = any(ends_with(tensor.name, HEADS) for tensor in self.tensors)
        if (
            has_head
            and tie_word_embeddings(config)
            and any(not model.is_tied for model in self.inputs.values())
        ):
            for part in (config, text):
                if part.get("tie_word_embeddings"):
                    part["tie_word_embeddings"] = False
        return config

    def _dtype(self) -> str:
        """The type of most elements."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            if tensor.dtype in CODES:
                sizes[tensor.dtype] += tensor.size
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else "float32"

    def _set_vocabulary(self, config: dict[str, Any], text: dict[str, Any]) -> None:
        embedding = next((tensor for tensor in self.tensors if ends_with(tensor.name, EMBEDDINGS)), None)
        own = next((name for name in self.donor.names if ends_with(name, EMBEDDINGS)), None)
        reader = self.donor.reader(own) if own else None
        if embedding is not None and reader is not None and embedding.shape[0] != reader.shape[0]:
            for part in (config, text):
                if "vocab_size" in part or part is text:
                    part["vocab_size"] = embedding.shape[0]
        for part in (config, text):
            self._set_token_ids(part, "config.json")

    def _set_token_ids(self, settings: dict[str, Any], *names: str) -> bool:
        """Where the tokenizer is not the donor's: the numbers of special tokens by the files beside it, last one first.

        Returns:
            Whether anything changed.
        """
        before = dict(settings)
        if self.unified is not None and self.unified.origin != self.donor.tokenizer_folder:
            for name in names:
                says = read_json(self.unified.origin / name)
                settings.update({key: says[key] for key in TOKEN_IDS if key in settings and key in says})
        return settings != before

    # --- tokenizer

    @property
    def tokenizer_folder(self) -> Path:
        return self.unified.origin if self.unified is not None else self.donor.tokenizer_folder

    def _tokenizer_files(self) -> list[str]:
        return [name for name in TOKENIZER_FILES if (self.tokenizer_folder / name).is_file()]

    def _write_tokenizer(self, folder: Path) -> None:
        changed = self.unified.tokenizer if self.unified is not None else None
        for name in self._tokenizer_files():
            # The other forms know nothing of the tokens that a merge adds to tokenizer.json.
            if changed is not None and name in (*VOCABULARY_FILES, TOKENIZER_FILE, "added_tokens.json"):
                continue
            copy_file(self.tokenizer_folder, name, folder)
        if changed is not None:
            write(folder / TOKENIZER_FILE, changed.to_str(pretty=True))
        if self.chat_template is not None:
            path = folder / TOKENIZER_CONFIG
            settings = read_json(path)
            if settings.pop("chat_template", None) is not None:
                self._write_json(path, settings)
            write(folder / TEMPLATE_FILE, self.chat_template)

    @cached_property
    def chat_template(self) -> str | None:
        """The template that the recipe asks for; None where the tokenizer's own stays. Raises ModelError."""
        wanted = self.recipe.chat_template
        if not wanted:
            return None
        if wanted == "auto":
            own = [template_of(model.tokenizer_folder) for model in self.inputs.values()]
            templates = Counter(template for template in own if template)
            return templates.most_common(1)[0][0] if templates else None
        template = TEMPLATES.get(wanted) or (
            wanted if "{" in wanted and len(wanted) >= MIN_TEMPLATE_LENGTH else None
        )
        path = Path(wanted).expanduser()
        if template is None and "\n" not in wanted and path.suffix == ".jinja" and path.is_file():
            template = read_text(path)
        if template is None:
            names = ", ".join(("auto", *TEMPLATES))
            raise ModelError(
                f"chat_template: '{wanted[:60]}' is not one of {names}, a .jinja file or a template"
                f"{did_you_mean(wanted, ('auto', *TEMPLATES))}"
            )
        _check_template(template)
        return template

    @staticmethod
    def _write_json(path: Path, value: Mapping[str, Any]) -> None:
        write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def template_of(folder: Path) -> str | None:
    """The chat template of a folder's tokenizer."""
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return read_text(path).strip()
    template = read_json(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template.strip() if isinstance(template, str) and template.strip() else None


def _check_template(template: str) -> None:
    """Parse it; nothing of it is run."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template.replace("{% generation %}", ""))
    except TemplateSyntaxError as error:
        if "generation" not in str(error):  # a tag of transformers, which marks what the assistant says
            raise ModelError(f"chat_template, line {error.lineno}: {error.message}") from None
