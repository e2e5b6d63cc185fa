"""The command line: recipes by flags, mergekit's flags, exit statuses, notes, progress."""

import json
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open

from toolkit.config.load import load_for_command
from toolkit.config.merge_command import NEEDLESS, MergeConfig, MergekitOptions, arguments, num_bytes
from toolkit.merging.commands import DIGESTS_NAME, flag_notes
from toolkit.merging.merge_progress import MergeProgress
from toolkit.merging.plan import MergePlan, OutputTensor
from toolkit.merging.recipes.plan_text import copy_bandwidth
from toolkit.merging.streaming import digest_memory


def parsed(*words: str) -> MergeConfig:
    return load_for_command(MergeConfig, arguments(list(words))).config


@pytest.fixture
def pair(trio) -> list[str]:
    return ["--method", "linear", "--models", str(trio["a"]), str(trio["b"])]


# --- how words are read


def test_two_words_are_recipe_and_folder():
    config = parsed("-j", "4", "merge.yml", "--cuda", "out", "-vv")
    assert (str(config.config), str(config.out), config.num_threads, config.cuda, config.verbose) == (
        *("merge.yml", "out", 4, True, True),
    )


def test_lists_take_words_commas_and_repetition():
    config = parsed(
        *("--models", "a,b", "--weights", ".5", "-.3,1e-1", "--models=c,d", "--models", "e"),
        *("--out", "o", "--method", "m"),
    )
    assert config.models == ["a", "b", "c", "d", "e"]
    assert config.weights == [0.5, -0.3, 0.1]


def test_a_path_with_a_comma_stays_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there,too").mkdir()
    rest = ("--out", "o", "--method", "m")
    assert parsed("--models", "one,half", "b", *rest).models == ["one,half", "b"]
    assert parsed("--models", "there,too", *rest).models == ["there,too"]
    assert parsed("--models=there,too", "--models=a,b", *rest).models == ["there,too", "a", "b"]
    assert parsed("--fisher", "f,1", "f,2", *rest).fisher == ["f,1", "f,2"]


def test_one_word_beside_a_method_is_the_folder():
    config = parsed("out", "--method", "linear", "--models", "a", "b")
    assert (str(config.out), config.config) == ("out", None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5B", 5e9), ("5GB", 5e9), ("500mb", 5e8), ("2GiB", 2**31), ("1.5k", 1500), ("700", 700)],
)
def test_sizes(text, expected):
    assert num_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5XB", "0", "0.1"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError):
        num_bytes(text)


# --- mergekit's flags

MERGEKIT_FLAGS = (
    *("--allow-crimes", "--unsafe-truncate-embeddings", "--transformers-cache=c", "--lora-merge-cache=c"),
    *("--lora-merge-dtype=float32", "--cuda", "--device=cpu", "--low-cpu-memory", "--out-shard-size=5B"),
    *("--copy-tokenizer", "--no-copy-tokenizer", "--clone-tensors", "--trust-remote-code", "--random-seed=3"),
    *(
        "--lazy-unpickle",
        "--write-model-card",
        "--no-write-model-card",
        "--safe-serialization",
        "--quiet",
        "-q",
    ),
    *(
        "--no-safe-serialization",
        "--read-to-gpu",
        "--multi-gpu",
        "--num-threads=2",
        "-j2",
        "--gpu-rich",
        "-v",
    ),
    *("--async-write", "--no-async-write", "--write-threads=2"),
)


@pytest.mark.parametrize("flag", MERGEKIT_FLAGS)
def test_every_flag_of_mergekit_is_accepted(flag):
    assert parsed("merge.yml", "out", flag)


@pytest.mark.parametrize("name", [name for name in NEEDLESS if name != "gpu_rich"])
def test_a_flag_without_effect_gets_one_note(name):
    value = {"write_threads": 2, "lora_merge_cache": "c", "lora_merge_dtype": "x"}.get(name, True)
    notes = flag_notes(MergeConfig(out="o", **{name: value}), {name})
    assert len(notes) == 1
    assert notes[0].startswith(f"--{name.replace('_', '-')} has no effect: ")


def test_every_flag_has_an_effect_or_a_note():
    """A field of the options is read by the code of the command, or is one of those that get a note."""
    from pathlib import Path

    import toolkit.merging as package

    folder = Path(package.__file__ or "").parent
    read = "".join(
        (folder / name).read_text() for name in ("commands.py", "adapter_merge.py", "recipes/flag_recipe.py")
    )
    for name in MergeConfig.model_fields.keys() - MergekitOptions.model_fields.keys():
        assert re.search(rf"(config|options)\.{name}\b", read), name


def test_meaningful_flags_of_mergekit_work(run_merge, pair, trio, tmp_path):
    out = tmp_path / "out"
    status, _, errors = run_merge(
        *(
            *pair,
            "--out",
            out,
            "--out-shard-size",
            "100K",
            "--no-copy-tokenizer",
            "--no-write-model-card",
            "-j",
            1,
        )
    )
    assert (status, errors) == (0, "")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    assert (out / "model.safetensors.index.json").is_file()
    assert not (out / "tokenizer.json").exists()
    assert not (out / "README.md").exists()


def test_the_seed_decides_the_masks(run_merge, trio, tmp_path):
    words = [
        "--method",
        "dare_ties",
        "--base",
        trio["a"],
        "--models",
        trio["b"],
        trio["c"],
        "--density",
        ".5",
    ]
    bytes_of = {}
    for name, more in {
        "first": ["--random-seed", 7],
        "again": ["--seed", 7, "-j1"],
        "other": ["--seed", 8],
    }.items():
        assert run_merge(*words, "--out", tmp_path / name, *more)[0] == 0
        bytes_of[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert bytes_of["first"] == bytes_of["again"] != bytes_of["other"]


# --- ours


def test_density_once_is_for_all_models(run_merge, trio, tmp_path):
    words = [
        "--method",
        "ties",
        "--base",
        trio["a"],
        "--models",
        trio["b"],
        trio["c"],
        "--dry-run",
        "--out",
        "o",
    ]
    assert "density [0.2, 0.2]" in run_merge(*words, "--density", ".2")[1]
    assert "density [0.2, 0.4]" in run_merge(*words, "--density", ".2", ".4")[1]
    assert "density [1, 1]" in run_merge(*words)[1]


def test_slerp_takes_its_first_model_as_base(run_merge, trio):
    words = [
        "--method",
        "slerp",
        "--models",
        trio["b"],
        trio["a"],
        "--param",
        "t=[0,1]",
        "--dry-run",
        "--out",
        "o",
    ]
    status, text, _ = run_merge(*words)
    assert status == 0
    assert f"base      {trio['b']}" in text
    assert "slerp; t 0;" in text
    assert "slerp; t 1;" in text


def test_report_is_written_elsewhere_too(run_merge, pair, tmp_path):
    assert (
        run_merge(*pair, "--out", tmp_path / "out", "--report", tmp_path / "r.json", "--no-hash-inputs")[0]
        == 0
    )
    report = json.loads((tmp_path / "r.json").read_text())
    assert report == json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["method"] == "linear"


def test_digests_are_remembered_in_the_cache_unless_told_otherwise(run_merge, pair, tmp_path, monkeypatch):
    monkeypatch.setenv("MELDKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digest_memory, "SETTLED_NS", 0)  # the models have just been written

    def digests(*words: str) -> set[str]:
        assert run_merge(*pair, "--out", tmp_path / "out", "--overwrite", *words)[0] == 0
        report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
        return {file["sha256_was"] for model in report["inputs"] for file in model["files"]}

    assert digests("--no-remember-hashes") == {"computed"}
    assert not (tmp_path / "cache" / DIGESTS_NAME).exists()
    assert digests() == {"computed"}
    assert digests() == {"remembered"}
    assert digests("--no-remember-hashes") == {"computed"}
    assert digests("--verify") == {"computed"}


def test_quiet_says_nothing(run_merge, pair, tmp_path):
    assert run_merge(*pair, "--out", tmp_path / "out", "-q", "--lazy-unpickle") == (0, "", "")


def test_verbose_prints_the_plan_first(run_merge, pair, tmp_path):
    _, text, errors = run_merge(*pair, "--out", tmp_path / "out", "-v", "--lazy-unpickle")
    assert text.startswith("Method   linear")
    assert "Note     --lazy-unpickle has no effect" in text
    assert "20 tensors, 460 kB in 1 file" in text
    assert errors == ""


def test_an_existing_folder_is_replaced_only_when_asked(run_merge, pair, tmp_path):
    out = tmp_path / "out"
    assert run_merge(*pair, "--out", out)[0] == 0
    status, _, errors = run_merge(*pair, "--out", out)
    assert status == 2
    assert "--overwrite" in errors
    assert run_merge(*pair, "--out", out, "--overwrite")[0] == 0


def test_backends_give_the_same_bytes(run_merge, pair, tmp_path):
    found = set()
    for backend in ("numba", "torch", "reference"):
        assert run_merge(*pair, "--out", tmp_path / backend, "--backend", backend)[0] == 0
        found.add((tmp_path / backend / "model.safetensors").read_bytes())
    assert len(found) == 1


def test_dtype_and_lists_of_threads(run_merge, pair, tmp_path):
    assert run_merge(*pair, "--out", tmp_path / "out", "--dtype", "bf16", "--num-threads", 3)[0] == 0
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.get_slice("model.norm.weight").get_dtype() == "BF16"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "o"], "what to merge is missing"),
        (["merge.yml"], "out is missing: --out PATH"),
        (["merge.yml", "o", "--method", "linear"], "--method: the recipe merge.yml says this"),
        (["merge.yml", "o", "--seed", "1", "--random-seed", "1"], "--seed and --random-seed say the same"),
        (["merge.yml", "o", "--max-shard-size", "1GB", "--out-shard-size", "1B"], "say the same"),
        (["merge.yml", "o", "-q", "-v"], "exclude each other"),
        (["merge.yml", "o", "--device", "gpu"], "'gpu' is not one of auto, cpu, cuda, cuda:N"),
        (["merge.yml", "o", "--max-shard-size", "much"], "'much' is not a size"),
        (["merge.yml", "o", "--alow-crimes"], "unknown option; did you mean '--allow-crimes'?"),
        (["merge.yml", "o", "more"], "'more': an option begins with --"),
        (["nowhere.yml", "o"], "nowhere.yml: no such file"),
        (["--method", "tys", "--models", "a", "b", "--out", "o"], "no merge method 'tys'"),
        (["--method", "tie", "--models", "a", "b", "--out", "o"], "did you mean 'ties'?"),
        (["--method", "linear", "--out", "o"], "--models is missing"),
        (
            ["--method", "linear", "--models", "a", "b", "--weights", "1", "--out", "o"],
            "--weights: 1 values for 2 models",
        ),
        (["--method", "ties", "--models", "a", "b", "--out", "o"], "ties needs --base"),
        (["--method", "slerp", "--models", "a", "b", "--out", "o"], "slerp needs --param t=VALUE"),
        (["--method", "fisher", "--models", "a", "b", "--out", "o"], "fisher needs --fisher"),
        (
            ["--method", "linear", "--models", "a", "b", "--param", "normalise=true", "--out", "o"],
            "linear has no parameter 'normalise'; did you mean 'normalize'?",
        ),
        (["--method", "linear", "--models", "./nowhere", "--out", "o"], "there is no nowhere"),
        (
            ["--method", "linear", "--base", "base_model", "--models", "a", "--out", "o"],
            "- --base base_model is merged too, as linear has no base, and has no 'weight'; list it among the models "
            "with one, or leave it out\n",
        ),
        (
            ["--method", "slerp", "--models", "./base_model", "./base_model", "--param", "t=1", "--out", "o"],
            "./base_model is given twice",
        ),
        (
            ["--method", "linear", "--models", "/merge_method: a", "/merge_method: a", "--out", "o"],
            "/merge_method: a is given twice",
        ),
        (
            ["--method", "slerp", "--models", "a", "b", "c", "--param", "t=1", "--out", "o"],
            "slerp takes 1 model beside --base, not 2",
        ),
        (
            ["--method", "sce", "--base", "c", "--models", "a", "b", "--weights", "1", "2", "--out", "o"],
            "--weights: sce has no parameter 'weight'",
        ),
        (
            ["--method", "linear", "--models", "a", "b", "--dtype", "int8", "--out", "o"],
            "--dtype: 'int8' is not one of",
        ),
    ],
)
def test_wrong_words_are_said_and_nothing_is_written(run_merge, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    status, text, errors = run_merge(*words)
    assert (status, text) == (2, "")
    assert message in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_cuda_that_is_not_there_is_said_before_anything_is_written(run_merge, pair, tmp_path):
    import torch

    status, _, errors = run_merge(*pair, "--out", tmp_path / "out", "--device", "cuda:99")
    assert status == 2
    assert f"--device cuda:99: this machine has {torch.cuda.device_count()} CUDA devices" in errors
    assert not (tmp_path / "out").exists()


def test_nan_in_an_input_is_an_error_or_kept(run_merge, make_model, tmp_path):
    folder = make_model("m", {"x": np.array([1, np.nan], np.float32)}, num_hidden_layers=1)
    words = ["--method", "linear", "--models", folder, "--out", tmp_path / "out"]
    status, _, errors = run_merge(*words)
    assert status in (1, 2)
    assert "x" in errors
    assert "m/model.safetensors" in errors
    assert not (tmp_path / "out").exists()
    assert run_merge(*words, "--non-finite", "keep")[0] == 0


# --- values that no tensor is needed for to see that they are wrong

WRONG_VALUES = [
    ("ties", "density", ["--density", "1.5"], "1.5 does not lie between 0 and 1"),
    ("dare_ties", "density", ["--density", "0.5", "-0.1"], "-0.1 does not lie between 0 and 1"),
    ("breadcrumbs", "gamma", ["--param", "gamma=[0,2]"], "2 does not lie between 0 and 1"),
    ("sce", "select_topk", ["--param", "select_topk=7"], "7 does not lie between 0 and 1"),
    (
        "fisher",
        "fisher_normalize",
        ["--fisher", "f", "g", "--param", "fisher_normalize=modell"],
        "'modell' is not one of model, tensor, none; did you mean 'model'?",
    ),
    (
        "fisher",
        "fisher_floor",
        ["--fisher", "f", "g", "--param", "fisher_floor=-1"],
        "-1 is less than 0",
    ),
]


@pytest.mark.parametrize(("method", "name", "words", "message"), WRONG_VALUES)
def test_a_value_out_of_range_is_named_with_its_flag(run_merge, trio, method, name, words, message):
    base = [] if method == "fisher" else ["--base", trio["a"]]
    models = ["--models", trio["b"], trio["c"]]
    status, _, errors = run_merge("--method", method, *base, *models, *words, "--out", "o", "--dry-run")
    flag = "--density" if name == "density" else f"--param {name}"
    assert status == 2
    assert f"- {flag}: {message}\n" in errors


def test_a_value_out_of_range_is_named_with_its_line(run_merge, write_recipe, trio, tmp_path):
    path = write_recipe(
        f"merge_method: ties\nbase_model: {trio['a']}\nmodels:\n  - model: {trio['b']}\n    parameters:\n"
        "      weight: 1\n      density: 1.5\n"
    )
    status, _, errors = run_merge(path, tmp_path / "o", "--dry-run")
    assert status == 2
    assert f"{path}:7: density: 1.5 does not lie between 0 and 1" in errors


@pytest.mark.parametrize("method", ["linear", "multislerp", "karcher", "fisher_simple"])
def test_weights_that_cancel_are_seen_while_planning(run_merge, trio, method, tmp_path):
    words = ["--method", method, "--models", trio["a"], trio["b"], "--out", tmp_path / "o", "--dry-run"]
    status, _, errors = run_merge(*words, "--weights", 1, -1)
    assert status == 2
    assert "- --weights: the weights 1, -1 add up to 0" in errors


def test_weights_that_cancel_in_some_tensors_are_named_with_their_line(
    run_merge, write_recipe, trio, tmp_path
):
    recipe = (
        f"merge_method: linear\nmodels:\n  - model: {trio['a']}\n    parameters:\n"
        "      weight: [{filter: norm, value: -1}, {value: 1}]\n"
        f"  - {{model: {trio['b']}, parameters: {{weight: 1}}}}\nparameters: {{normalize: NORMALIZE}}\n"
    )
    path = write_recipe(recipe.replace("NORMALIZE", "true"))
    status, _, errors = run_merge(path, tmp_path / "o", "--dry-run")
    assert status == 2
    assert f"- {path}:5: the weights -1, 1 add up to 0" in errors
    assert run_merge(write_recipe(recipe.replace("NORMALIZE", "false")), tmp_path / "o", "--dry-run")[0] == 0


# --- progress


def a_plan(num_tensors: int) -> MergePlan:
    tensors = [OutputTensor(f"t{i}", (250_000,), "float32", ()) for i in range(num_tensors)]
    return MergePlan(tensors, [], "linear", 0, {}, [], lambda folder: None)


class Pipe:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        self.lines.append(text)
        return len(text)

    def flush(self) -> None:
        pass


def test_progress_without_a_terminal_is_a_line_now_and_then():
    now = [0.0]
    pipe = Pipe()
    with MergeProgress(a_plan(100), quiet=False, stream=pipe, clock=lambda: now[0]) as progress:
        for second in range(26):
            now[0] = float(second)
            progress.update(second * 4_000_000)
    assert pipe.lines == [
        "merging: 40%, 40.0 MB of 100 MB, 40/100 tensors, 0.0 GB/s, 0:15 left\n",
        "merging: 80%, 80.0 MB of 100 MB, 80/100 tensors, 0.0 GB/s, 0:05 left\n",
    ]


def test_a_resumed_merge_does_not_count_what_was_done_before():
    now = [0.0]
    progress = MergeProgress(a_plan(100), quiet=False, stream=Pipe(), clock=lambda: now[0])
    progress.update(90_000_000)
    assert progress.text(95_000_000, 5.0).endswith("0:05 left")


def test_a_bar_on_a_terminal(trio, tmp_path):
    leader, follower = pty.openpty()
    words = ["--method", "linear", "--models", str(trio["a"]), str(trio["b"]), "--out", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, "-m", "toolkit", "merge", *words],
        stderr=follower,
        stdout=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm"},
        timeout=120,
        check=False,
    )
    os.close(follower)
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert result.returncode == 0
    assert "merging" in shown
    assert "100%, 460 kB of 460 kB, 20/20 tensors" in shown


def test_the_probe_measures_something_plausible():
    assert 1e8 < copy_bandwidth(2) < 1e13
