"""Merging files: meldkit against mergekit 0.1.5 on the same files, alternating, and against mere reading and writing.

    bash bench/mergekit_env.sh                                   # mergekit in an environment of its own, once
    python bench/merge.py [speed|memory|small] [--out bench/results/merge_speed.json]

speed   4 Llama-shaped bf16 models of 350 M parameters: linear of four, SLERP of two, TIES and DARE-TIES of three and a
        base.
        engine: imports not counted, meldkit's hashing and fsync off as mergekit has neither; beside it the copy that
        merely reads the inputs and writes an output of that size. mergekit_over_copy is what no engine can exceed.
        whole_process: as a user calls it, with meldkit's SHA-256 of all inputs and fsync. meldkit_first has never seen
        the inputs; meldkit_again has merged them before, and remembers the SHA-256 of files that have not changed.
memory  peak anonymous memory of the process for 2, 4 and 8 models of 350 M and of 1.5 B parameters.
small   20,000 tensors of a few bytes each (mergekit takes a quarter of an hour).

The files are in the page cache, Python's byte code and meldkit's machine code are there from an earlier run. Reported:
medians over the repeats and the median of the paired ratios.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file

from toolkit.merging.commands import DIGESTS_NAME
from toolkit.merging.streaming.digest_memory import SETTLED_NS

HERE = Path(__file__).resolve().parent
# Between two looks at a process's memory.
POLL_SECONDS = 0.01
MERGEKIT_PYTHON = HERE.parent / ".cache" / "bench" / "mergekit" / "bin" / "python"
SIZES = {
    "350M": {"hidden": 1024, "intermediate": 2816, "layers": 22, "vocabulary": 32000},
    "1.5B": {"hidden": 2048, "intermediate": 5504, "layers": 27, "vocabulary": 32000},
    "small": {"hidden": 8, "intermediate": 16, "layers": 2222, "vocabulary": 64},
}


def llama_shapes(hidden: int, intermediate: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("q", "k", "v", "o"):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def make_models(folder: Path, size: str, count: int) -> list[Path]:
    """A base and ``count - 1`` models that differ from it by a few per cent, made once."""
    dimensions = SIZES[size]
    shapes = llama_shapes(**dimensions)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dimensions["hidden"],
        "intermediate_size": dimensions["intermediate"],
        "num_hidden_layers": dimensions["layers"],
        "num_attention_heads": max(dimensions["hidden"] // 64, 1),
        "num_key_value_heads": max(dimensions["hidden"] // 64, 1),
        "vocab_size": dimensions["vocabulary"],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    paths = [folder / f"{size}-{index}" for index in range(count)]
    for index, path in enumerate(paths):
        if (path / "config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        own = torch.Generator().manual_seed(1000 + index)
        common = torch.Generator().manual_seed(0)
        tensors = {}
        for name, shape in shapes.items():
            base = torch.randn(shape, generator=common) * 0.02
            delta = torch.randn(shape, generator=own) * 0.0005 if index else 0.0
            tensors[name] = (base + delta).to(torch.bfloat16)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))
    return paths


def recipe(method: str, models: list[Path]) -> str:
    """A recipe that mergekit and meldkit both read. The first model is the base where there is one."""
    lines = [f"merge_method: {method}", "dtype: bfloat16"]
    if method == "linear":
        weights = [0.4, 0.3, 0.2, 0.1, 0.4, 0.3, 0.2, 0.1][: len(models)]
        rows = [
            f"  - model: {m}\n    parameters: {{weight: {w}}}" for m, w in zip(models, weights, strict=True)
        ]
    elif method == "slerp":
        lines += [f"base_model: {models[0]}", "parameters: {t: 0.3}"]
        rows = [f"  - model: {m}" for m in models]
    else:
        lines.append(f"base_model: {models[0]}")
        rows = [f"  - model: {m}\n    parameters: {{weight: 0.4, density: 0.2}}" for m in models[1:]]
    return "\n".join([*lines, "models:", *rows]) + "\n"


CASES = {"linear of 4": ("linear", 4), "slerp of 2": ("slerp", 2)}
CASES |= {"ties of 3 and a base": ("ties", 4), "dare_ties of 3 and a base": ("dare_ties", 4)}


def environment(cache: Path) -> dict[str, str]:
    threads = str(len(os.sched_getaffinity(0)))
    inherited = {
        k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"
    }  # users keep byte code
    return inherited | {
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MELDKIT_CACHE": str(cache),
    }


def timed(command: list[str], out: Path) -> dict:
    """A fresh process: seconds by the clock, peak anonymous memory in MB, standard output, meldkit's report."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # what the run before left to write is not this one's
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=environment(out.parent / "cache"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(
                peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0
            )
        except (OSError, TypeError):
            pass
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - began
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors[-3000:]}")
    report = out / "merge_report.json"
    facts = json.loads(report.read_text()) if report.exists() else {}
    shutil.rmtree(out, ignore_errors=True)
    return {"whole_seconds": seconds, "peak_anonymous_MB": peak / 1024, "output": output, "report": facts}


def whole_process(arm: str, config: Path, out: Path) -> list[str]:
    """What a user types."""
    if arm == "mergekit":
        return [str(MERGEKIT_PYTHON.with_name("mergekit-yaml")), str(config), str(out), "--no-copy-tokenizer"]
    if arm == "meldkit_first":
        (out.parent / "cache" / DIGESTS_NAME).unlink(missing_ok=True)
    return [str(Path(sys.executable).with_name("meldkit")), "merge", str(config), str(out), "--quiet"]


def check_digests(arm: str, report: dict) -> None:
    """Raises SystemExit where an arm has not done what its name says."""
    found = {file["sha256_was"] for model in report["inputs"] for file in model["files"]}
    expected = {"meldkit_first": "computed", "meldkit_again": "remembered"}[arm]
    if found != {expected}:
        raise SystemExit(f"{arm}: digests were {found}, not all {expected}")


def engine(arm: str, config: Path, out: Path) -> list[str]:
    python = str(MERGEKIT_PYTHON) if arm == "mergekit" else sys.executable
    return [python, str(HERE / "merge_arms.py"), arm, str(config), str(out)]


def alternate(arms: list[str], repeats: int, run: Callable[[str], dict]) -> dict[str, list[dict]]:
    results: dict[str, list[dict]] = {arm: [] for arm in arms}
    for repeat in range(repeats):
        for arm in arms if repeat % 2 == 0 else arms[::-1]:
            results[arm].append(run(arm))
    return results


def median(rows: list[dict], key: str) -> float:
    return round(statistics.median(row[key] for row in rows), 4)


def paired(rows: list[dict], peers: list[dict], key: str) -> float:
    """Median over the repeats of peer / ours."""
    pairs = zip(rows, peers, strict=True)
    return round(statistics.median(peer[key] / own[key] for own, peer in pairs), 2)


def measure(arms: list[str], config: Path, out: Path, repeats: int, size: int, *, whole: bool) -> dict:
    """Seconds of each arm, and for each of meldkit's the paired ratios of the others to it."""

    def run(arm: str) -> dict:
        row = timed((whole_process if whole else engine)(arm, config, out), out)
        if whole and arm != "mergekit":
            check_digests(arm, row["report"])
        return row if whole else row | json.loads(row["output"].strip().splitlines()[-1])

    rows = alternate(arms, repeats, run)
    key = "whole_seconds" if whole else "seconds"
    result: dict = {}
    for arm in arms:
        result[arm] = {"seconds": median(rows[arm], key)}
        result[arm]["peak_anonymous_MB"] = round(max(row["peak_anonymous_MB"] for row in rows[arm]))
        if not whole:
            result[arm]["GB_per_second"] = round(size / 1e9 / result[arm]["seconds"], 2)
    own = [arm for arm in arms if arm.startswith("meldkit")]
    peers = [arm for arm in arms if arm not in own]
    for peer in peers:
        for arm in own:
            result[f"{peer}_over_{arm}"] = paired(rows[arm], rows[peer], key)
    if {"copy", "mergekit"} <= set(peers):
        result["mergekit_over_copy"] = paired(rows["copy"], rows["mergekit"], key)
    return result


def speed(work: Path, repeats: int, with_mergekit: bool) -> dict:
    models = make_models(work, "350M", 4)
    settle(models)
    peers = ["mergekit"] if with_mergekit else []
    results: dict = {}
    prepare(work, models, peers)
    for title, (method, count) in CASES.items():
        config, out = work / "recipe.yml", work / "out"
        config.write_text(recipe(method, models[:count]))
        size = sum((m / "model.safetensors").stat().st_size for m in [*models[:count], models[0]])
        warm(models)
        results[title] = {
            "engine": measure(["meldkit", "copy", *peers], config, out, repeats, size, whole=False),
            "whole_process": measure(
                ["meldkit_first", "meldkit_again", *peers], config, out, repeats, size, whole=True
            ),
        }
        print(title, json.dumps(results[title], indent=1), flush=True)
    return results


def small(work: Path, repeats: int, with_mergekit: bool) -> dict:
    models = make_models(work, "small", 2)
    config, out = work / "recipe.yml", work / "out"
    config.write_text(recipe("linear", models))
    arms = ["meldkit", *(["mergekit"] if with_mergekit else [])]
    size = sum((m / "model.safetensors").stat().st_size for m in [*models, models[0]])
    return {
        "num_tensors": len(llama_shapes(**SIZES["small"])),
        "engine": measure(arms, config, out, repeats, size, whole=False),
    }


def memory(work: Path, repeats: int, with_mergekit: bool) -> dict:
    """More than two models are hard links to two: memory does not depend on what is in them."""
    results: dict = {}
    for size in ("350M", "1.5B"):
        two = make_models(work, size, 2)
        for count in (2, 4, 8):
            models = []
            for index in range(count):
                link = work / f"link-{size}-{index}"
                shutil.rmtree(link, ignore_errors=True)
                shutil.copytree(two[index % 2], link, copy_function=os.link)
                models.append(link)
            for method in ("linear", "ties", "dare_ties"):
                config, out = work / "recipe.yml", work / "out"
                config.write_text(recipe(method, models))
                timed(
                    whole_process("meldkit_first", config, out), out
                )  # compiles what this number of models needs
                peak = timed(whole_process("meldkit_first", config, out), out)["peak_anonymous_MB"]
                results[f"{method}, {count} models of {size}"] = {"meldkit_MB": round(peak)}
                print(method, count, size, results[f"{method}, {count} models of {size}"], flush=True)
            for link in models:
                shutil.rmtree(link)
    return results


def settle(models: list[Path]) -> None:
    """Wait until meldkit trusts that the files are no longer written."""
    newest = max(path.stat().st_ctime for model in models for path in model.glob("*.safetensors"))
    time.sleep(max(0.0, newest + SETTLED_NS / 1e9 + 1 - time.time()))


def prepare(work: Path, models: list[Path], peers: list[str]) -> None:
    """One run of everything that is not timed: it leaves byte code and machine code behind."""
    config, out = work / "recipe.yml", work / "out"
    for method, count in CASES.values():
        config.write_text(recipe(method, models[:count]))
        timed(whole_process("meldkit_first", config, out), out)
    config.write_text(recipe("linear", models))
    for peer in peers:
        timed(whole_process(peer, config, out), out)


def warm(models: list[Path]) -> None:
    for model in models:
        for path in model.glob("*.safetensors"):
            with open(path, "rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="speed", choices=["speed", "memory", "small"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=HERE.parent / ".cache" / "bench" / "models")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-mergekit", action="store_true")
    arguments = parser.parse_args()
    with_mergekit = not arguments.without_mergekit and arguments.what != "memory"
    if with_mergekit and not MERGEKIT_PYTHON.exists():
        raise SystemExit("mergekit is not here: bash bench/mergekit_env.sh, or --without-mergekit")
    arguments.work.mkdir(parents=True, exist_ok=True)
    measured = {"speed": speed, "memory": memory, "small": small}[arguments.what](
        arguments.work, arguments.repeats, with_mergekit
    )
    report = {
        "command": f"python bench/merge.py {arguments.what} --repeats {arguments.repeats}",
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "numba", "safetensors")}
        | ({"mergekit": "0.1.5"} if with_mergekit else {}),
        "results": measured,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
