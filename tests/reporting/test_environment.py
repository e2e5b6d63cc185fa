import json
import subprocess
import sys
import types

import pytest

from toolkit.launch import devices
from toolkit.reporting import environment, resources


def test_the_description_is_json_and_names_what_matters():
    described = environment.describe()
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert described["versions"]["torch"]
    assert described["versions"]["meldkit"]
    assert described["cpu"]["usable_cores"] >= 1
    assert described["memory_bytes"] > 10**8


def test_no_secret_is_described(monkeypatch):
    secrets = {
        "HF_TOKEN": "s1",
        "WANDB_API_KEY": "s2",
        "MELDKIT_SECRET": "s3",
        "HF_AUTH": "s4",
        "CUDA_PASSWORD": "s5",
        "AWS_REGION": "s6",
        "HF_ENDPOINT": "https://user:s7@hub.example",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    variables = environment.variables()
    assert set(variables) & set(secrets) == {"HF_ENDPOINT"}
    assert variables["OMP_NUM_THREADS"] == "3"
    assert variables["TOKENIZERS_PARALLELISM"] == "true"
    assert variables["HF_ENDPOINT"] == "https://***@hub.example"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--hub-token", "abc", "--seed", "1"], ["--hub-token", "***", "--seed", "1"]),
        (["--api_key=abc"], ["--api_key=***"]),
        (["--tokenizer", "gpt2", "--sample-tokens", "48"], ["--tokenizer", "gpt2", "--sample-tokens", "48"]),
        (["--data", "https://me:pw@host/x"], ["--data", "https://***@host/x"]),
        (["--hub-token", "--seed"], ["--hub-token", "--seed"]),
    ],
)
def test_command_lines_are_redacted(arguments, expected):
    assert environment.redacted(arguments) == expected


def test_the_revision_of_a_checkout(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert environment.git_revision(tmp_path) is None
    git("init", "-q", "-b", "trunk")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    clean = environment.git_revision(tmp_path)
    (tmp_path / "file").write_text("2")
    dirty = environment.git_revision(tmp_path)
    assert clean is not None
    assert dirty is not None
    assert (clean["branch"], clean["is_dirty"], dirty["is_dirty"]) == ("trunk", False, True)
    assert len(clean["revision"]) == 40


def test_a_snapshot_measures_this_process():
    shot = resources.snapshot()
    assert shot.keys() == {"memory_bytes", "gpus"}
    assert 10**6 < shot["memory_bytes"] < 10**13
    assert isinstance(shot["gpus"], list)


def test_without_torch_a_snapshot_does_not_import_it():
    code = (
        "import sys; from toolkit.reporting.resources import snapshot; "
        "snapshot(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
def test_a_gpu_is_measured():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    torch.ones(1024, 1024, device="cuda")
    shot = resources.snapshot()
    assert shot["memory_bytes"] == torch.cuda.max_memory_reserved() >= 4 * 1024 * 1024
    assert shot["gpus"][0]["memory_used_bytes"] > 0
    assert 0 <= shot["gpus"][0]["utilization_percent"] <= 100
    assert resources.driver_version()
    assert resources.gpu_names()[0]["memory_bytes"] > 10**9


def test_several_gpus_count_as_one():
    gpus = [
        {"index": 0, "utilization_percent": 50.0, "power_watts": 100.0, "memory_used_bytes": 10},
        {"index": 3, "utilization_percent": 100.0, "power_watts": None, "memory_used_bytes": 20},
    ]
    assert resources.gpu_of_run(gpus) == {
        "utilization_percent": 75.0,
        "power_watts": 100.0,
        "memory_used_bytes": 30,
    }
    assert resources.gpu_of_run([]) is None


def test_the_gpus_of_a_run_are_those_of_the_launch_layer(monkeypatch):
    library = types.SimpleNamespace(
        NVMLError=OSError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(
        devices,
        "machine_gpus",
        lambda: [devices.Gpu(uuid, 0, uuid, "Test (MIG)", (9, 0), 10) for uuid in ("MIG-a", "MIG-b")],
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-b")
    nvml = resources._Nvml()
    assert nvml.describe() == [{"index": 0, "name": "Test (MIG)", "memory_bytes": 10}]
    assert [handle for _, handle in nvml._opened()] == ["MIG-b"]
