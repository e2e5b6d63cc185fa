"""``meldkit merge``: read the recipe, plan, show, merge, sum up. Imports no torch unless something needs it."""

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolkit.cache_folder import cache_folder
from toolkit.config.load import load_for_command
from toolkit.config.merge_command import NEEDLESS, MergeConfig, RecipeOptions, arguments, num_bytes
from toolkit.config.option_help import options_help
from toolkit.durable import write_text
from toolkit.errors import ConfigError, Interrupted, LaunchError
from toolkit.reporting.wording import size
from toolkit.terminal import err, out

if TYPE_CHECKING:
    from toolkit.merging.plan import MergePlan
    from toolkit.merging.recipes.recipe import MergeRecipe

# In meldkit's cache.
DIGESTS_NAME = "input-digests.txt"
HELP_FLAGS = {"-h", "--help"}
WRONG_INPUT = 2
USAGE = "meldkit merge RECIPE.yml OUT [--OPTION VALUE ...] | meldkit merge --method NAME --models A B ... --out OUT"


def merge(argv: Sequence[str]) -> int:
    """Run ``meldkit merge`` and return the exit status."""
    words = list(argv)
    if not words or HELP_FLAGS & set(words) or words == ["help"]:
        out(options_help(USAGE, MergeConfig))
        return 0 if words else WRONG_INPUT
    loaded = load_for_command(MergeConfig, arguments(words))
    config = loaded.config
    given = {name for name, origin in loaded.provenance.items() if origin != "default"}
    _check_flags(config, given)
    notes = flag_notes(config, given)
    recipe = read_recipe(config)
    from toolkit.merging.adapter_merge import adapters_of, merge_adapters_of

    if folders := adapters_of(config, recipe):
        return merge_adapters_of(config, recipe, folders, given)
    if unused := sorted(given & {"lora_mode", "lora_rank"}):
        raise ConfigError([f"--{unused[0].replace('_', '-')} is for adapters, and the models are none"])
    plan = _plan(config, recipe, notes)
    if config.dry_run or (config.verbose and not config.quiet):
        from toolkit.merging.recipes.plan_text import plan_text

        out(plan_text(plan, config.out, shard_bytes(config), config.num_threads))
    if config.dry_run:
        out("Dry run: nothing was written.")
        return 0
    try:
        return _execute(config, plan)
    except Interrupted as interrupted:
        again = [word for word in words if word not in ("--resume", "--overwrite")]
        more = ["--overwrite"] if config.overwrite else []
        hint = shlex.join(["meldkit", "merge", *again, *more, "--resume"])
        raise Interrupted(interrupted.message, hint=hint) from None


def _execute(config: MergeConfig, plan: "MergePlan") -> int:
    from toolkit.merging.merge_progress import MergeProgress
    from toolkit.merging.streaming.engine import EngineOptions, execute

    if not config.quiet and not config.verbose:
        for note in plan.notes:
            err(f"note: {note}")
    with MergeProgress(plan, quiet=config.quiet) as progress:
        options = EngineOptions(
            num_threads=config.num_threads,
            backend=config.backend,
            device=device_of(config),
            resume=config.resume,
            verify=config.verify,
            overwrite=config.overwrite,
            non_finite=config.non_finite,
            max_shard_bytes=shard_bytes(config),
            hash_inputs=config.hash_inputs,
            digest_memory=cache_folder() / DIGESTS_NAME if config.remember_hashes else None,
            on_progress=progress.update,
        )
        report = execute(plan, config.out, options)
    if config.report is not None:
        write_text(config.report, report.as_json())
    if not config.quiet:
        for note in report.notes:
            if note not in plan.notes:
                err(f"note: {note}")
        count = len(report.outputs)
        out(
            f"{report.out}: {len(plan.tensors)} tensors, {size(report.bytes_written)} in "
            f"{count} file{'s' if count != 1 else ''}; {report.seconds.total:.1f} s, "
            f"{report.gigabytes_per_second:.1f} GB/s while merging"
            + (", verified" if report.verified is not None else "")
        )
    return 0


def _plan(config: MergeConfig, recipe: "MergeRecipe", notes: list[str]) -> "MergePlan":
    import dataclasses

    from toolkit.merging.recipes.resolve import PlanOptions, plan_merge

    options = PlanOptions(
        seed=seed_of(config),
        mix_architectures=config.allow_crimes,
        truncate_embeddings=config.unsafe_truncate_embeddings,
        on_missing=config.on_missing,
        hub_cache=config.transformers_cache,
        download=not config.dry_run,
        copy_code=config.trust_remote_code,
        copy_tokenizer=config.copy_tokenizer,
        write_card=config.write_model_card,
    )
    plan = plan_merge(recipe, options)
    return dataclasses.replace(plan, notes=[*notes, *plan.notes])


def read_recipe(config: MergeConfig) -> "MergeRecipe":
    """The recipe of the file, or of the flags. Raises ConfigError."""
    base_is_apart = config.lora_mode == "residual"
    if config.config is not None:
        from toolkit.merging.recipes.recipe_file import read

        return read(config.config, lenient=config.lenient, base_is_apart=base_is_apart)
    from toolkit.merging.recipes.flag_recipe import recipe_of_flags

    return recipe_of_flags(config, lenient=config.lenient, base_is_apart=base_is_apart)


def _check_flags(config: MergeConfig, given: set[str]) -> None:
    problems: list[str] = []
    beside = [f"--{name.replace('_', '-')}" for name in RecipeOptions.model_fields if name in given]
    if config.config is None and config.method is None:
        problems.append("what to merge is missing: a recipe file, or --method NAME --models A B C")
    if config.config is not None and beside:
        problems.append(f"{', '.join(beside)}: the recipe {config.config} says this; give one of them")
    for first, second in (("seed", "random_seed"), ("max_shard_size", "out_shard_size"), ("cuda", "device")):
        if first in given and second in given:
            names = [f"--{name.replace('_', '-')}" for name in (first, second)]
            problems.append(f"{names[0]} and {names[1]} say the same; give one of them")
    if config.quiet and config.verbose:
        problems.append("--quiet and --verbose exclude each other")
    if problems:
        raise ConfigError(problems, hint="meldkit merge --help")


def flag_notes(config: MergeConfig, given: set[str]) -> list[str]:
    """One note for each flag of mergekit that changes nothing here."""
    notes = []
    for name, reason in NEEDLESS.items():
        if name in given and name != "gpu_rich":
            flag = f"--{'no-' if getattr(config, name) is False else ''}{name.replace('_', '-')}"
            notes.append(f"{flag} has no effect: {reason[0].lower()}{reason[1:].rstrip('.')}")
    if config.gpu_rich:
        notes.append("--gpu-rich is --cuda; its other parts have no effect")
    if config.trust_remote_code:
        notes.append("--trust-remote-code: Python files of the model are copied, never run")
    return notes


def seed_of(config: MergeConfig) -> int:
    return config.seed if config.random_seed is None else config.random_seed


def shard_bytes(config: MergeConfig) -> int:
    return num_bytes(config.out_shard_size or config.max_shard_size)


def device_of(config: MergeConfig) -> str:
    """The device that the flags name. Raises LaunchError where it is not there."""
    wanted = "cuda" if config.cuda or config.gpu_rich else config.device
    if wanted == "cpu":
        return wanted
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    number = int(wanted.partition(":")[2] or 0)
    if number >= torch.cuda.device_count():
        raise LaunchError(f"--device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices")
    return wanted
