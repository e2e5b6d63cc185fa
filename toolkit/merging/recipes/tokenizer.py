"""The tokenizer of the result, where a recipe asks for one, and the vocabularies of all models."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.errors import ModelError
from toolkit.merging.recipes.recipe import ModelReference, TokenizerRequest
from toolkit.merging.recipes.vocabulary import Unified

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
HINT = "write it with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
# Other forms of a tokenizer's tokens.
VOCABULARY_FILES = (
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


def unify(
    request: TokenizerRequest,
    base: ModelReference,
    models: Mapping[ModelReference, Path],
    base_folder: Path,
    folder_of: Callable[[ModelReference], Path],
) -> Unified:
    """The tokenizer that a recipe asks for, and the vocabularies of all models.

    Args:
        base: the recipe's base model, else its first model.
        models: every model that is merged, and the folder of its tokenizer.
        base_folder: the folder of the base's tokenizer.
        folder_of: where another model lies, whose tokenizer alone is asked for.

    Raises:
        ModelError: a tokenizer is missing or cannot be read.
    """
    notes: list[str] = []
    tokenizers = {model: _load(folder) for model, folder in models.items()}
    if isinstance(request.source, ModelReference):
        origin = models.get(request.source) or folder_of(request.source)
    else:
        origin = base_folder
    chosen = _load(origin)
    if chosen is None:
        raise ModelError(f"{request.place}: {origin} has no {TOKENIZER_FILE}", hint=HINT)
    vocabularies: dict[ModelReference, dict[str, int]] = {}
    for model, tokenizer in tokenizers.items():
        if tokenizer is None:
            if own_files := _vocabulary_files(models[model]):
                raise ModelError(
                    f"{request.place}: {models[model]} has {own_files[0]} and no {TOKENIZER_FILE}, "
                    "so the numbers of its tokens are not known",
                    hint=HINT,
                )
            notes.append(f"{model} has no tokenizer: taken to have the tokens of {base}")
        own = tokenizer or tokenizers.get(base) or chosen
        vocabularies[model] = own.get_vocab(with_added_tokens=True)
    num_added = 0
    if request.source == "union":
        num_added += _add_all(
            chosen, [t for model, t in tokenizers.items() if t is not None and model != base]
        )
    missing = [token for token in request.tokens if chosen.token_to_id(token) is None]
    num_added += chosen.add_tokens(missing) if missing else 0
    return Unified(
        tokens=chosen.get_vocab(with_added_tokens=True),
        vocabularies=vocabularies,
        base=base,
        origin=origin,
        tokenizer=chosen if num_added else None,
        requests=request.tokens,
        pad_to_multiple_of=request.pad_to_multiple_of,
        keeps_rows=request.source != "union" or not num_added,
        notes=notes,
    )


def _vocabulary_files(folder: Path) -> list[str]:
    """A tokenizer's files in forms that are not read here."""
    names = (*VOCABULARY_FILES, *sorted(path.name for path in folder.glob("*.tiktoken")), TOKENIZER_CONFIG)
    return [name for name in names if (folder / name).is_file()]


def _load(folder: Path) -> Any:
    """The tokenizer of a folder, or None where there is none in the form of the tokenizers library."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{path} cannot be read: {error}") from None


def _add_all(tokenizer: Any, others: Sequence[Any]) -> int:
    """Add the tokens of others, model by model, ordinary ones before added ones, each by its number there."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab(with_added_tokens=True)
    special = [token for other in others for _, token in sorted(other.get_added_tokens_decoder().items())]
    contents = {token.content for token in special}
    ordinary: dict[str, None] = {}
    for other in others:
        vocabulary = other.get_vocab(with_added_tokens=True)
        for token in sorted(vocabulary, key=vocabulary.__getitem__):
            if token not in known and token not in contents:
                ordinary[token] = None
    tokens = [AddedToken(token, special=False) for token in ordinary]
    tokens += [token for token in special if token.content not in known]
    return tokenizer.add_tokens(tokens) if tokens else 0
