"""Data sets of the hub, also those that are still published as a loading script."""

from typing import Any

CONVERTED = "refs/convert/parquet"
"""The branch into which the hub converts every public data set: a folder a configuration, in it a folder a split."""
NO_SCRIPTS = "Dataset scripts are no longer supported"


def load_from_hub(name: str, configuration: str | None) -> Any:
    """What ``datasets.load_dataset`` returns: all splits.

    ``datasets`` 4 runs no scripts of others. Where a data set is one (AmazonScience/massive was), its rows are taken as
    the hub itself converted them.

    Raises:
        Exception: whatever ``datasets`` and the hub's client raise.
    """
    import datasets

    try:
        return datasets.load_dataset(name, configuration)
    except RuntimeError as error:
        if NO_SCRIPTS not in str(error):
            raise
    return datasets.load_dataset(name, revision=CONVERTED, data_dir=configuration or _only_folder(name))


def _only_folder(name: str) -> str:
    import huggingface_hub

    tree = huggingface_hub.HfApi().list_repo_tree(name, repo_type="dataset", revision=CONVERTED)
    folders = [entry.path for entry in tree if isinstance(entry, huggingface_hub.hf_api.RepoFolder)]
    if len(folders) != 1:
        raise ValueError(f"Config name is missing: there are {', '.join(folders) or 'none'}")
    return folders[0]
