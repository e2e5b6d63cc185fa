"""A name that a user gave: a path, or perhaps an id on the hub."""

FILE_ENDINGS = (
    *(".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt"),
    *(".gguf", ".safetensors", ".bin", ".pt", ".jinja", ".yaml", ".yml", ".zip", ".gz", ".zst"),
)


def can_only_be_a_path(source: str) -> bool:
    """Whether a source can be nothing but a path, there or not.

    ``gpt2`` and ``Qwen/Qwen2.5-0.5B`` may be hub ids as well; ``./gpt2``, ``gpt2/``, ``a/b/c`` and a name with
    the ending of a file may not.
    """
    begins_like_one = source.startswith((".", "/", "~"))
    ends_like_one = source.endswith("/") or source.lower().endswith(FILE_ENDINGS)
    return begins_like_one or ends_like_one or source.count("/") > 1 or "\\" in source
