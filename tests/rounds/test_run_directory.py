import subprocess
import sys

import pytest

from toolkit.errors import RunDirectoryError
from toolkit.rounds.run_directory import RunDirectory

CONFIG = {"learning_rate": 0.1, "resume": False, "log_level": "INFO"}


def open_run(path, *, resume=False, recipe="centralized-hf", begin=True, facts=None, **changes):
    run = RunDirectory(path, CONFIG | changes, recipe=recipe, resume=resume)
    if begin:
        run.begin(facts or {}, {"python": "3"})
    return run


def test_a_new_run_and_its_continuation(tmp_path):
    open_run(tmp_path / "run", facts={"data_fingerprint": "d"}).close()
    assert (tmp_path / "run" / "experiment_config.json").is_file()
    assert (tmp_path / "run" / "environment.json").is_file()
    again = open_run(tmp_path / "run", resume=True, log_level="DEBUG")
    again.check_facts({"data_fingerprint": "d"})
    assert not again.is_finished
    again.journal.append("finished")
    assert again.is_finished
    again.close()


def test_another_run_is_left_alone(tmp_path):
    open_run(tmp_path / "run").close()
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    with pytest.raises(RunDirectoryError, match="holds another run"):
        open_run(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunDirectoryError, match=r"not empty .*thesis\.tex"):
        open_run(tmp_path)


def test_a_saved_configuration_may_lie_there(tmp_path):
    (tmp_path / "experiment_config.json").write_text("{}")
    run = open_run(tmp_path)
    assert run.journal.records("created")[0]["config"] == CONFIG
    run.close()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(RunDirectoryError, match="nothing to resume"):
        open_run(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_resume_with_other_options_names_them(tmp_path):
    open_run(tmp_path / "run").close()
    with pytest.raises(RunDirectoryError, match=r"learning_rate: 0\.1 before, 0\.2 now"):
        open_run(tmp_path / "run", resume=True, learning_rate=0.2)
    with pytest.raises(RunDirectoryError, match="holds a run of centralized-hf"):
        open_run(tmp_path / "run", resume=True, recipe="federated")


def test_resume_on_other_data_or_base(tmp_path):
    open_run(tmp_path / "run", facts={"data_fingerprint": "one"}).close()
    again = open_run(tmp_path / "run", resume=True, begin=False)
    with pytest.raises(RunDirectoryError, match="data fingerprint is two, the run was started with one"):
        again.check_facts({"data_fingerprint": "two"})
    again.close()


def test_one_writer(tmp_path):
    run = open_run(tmp_path / "run")
    code = (
        "from toolkit.rounds.run_directory import RunDirectory; from pathlib import Path; import sys\n"
        f"RunDirectory(Path({str(tmp_path / 'run')!r}), {CONFIG!r}, recipe='centralized-hf', resume=True)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "in use by another process" in result.stderr
    run.close()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        open_run(tmp_path / "file" / "run")


def test_before_it_begins_nothing_stays_behind(tmp_path):
    open_run(tmp_path / "run", begin=False).close()
    assert not (tmp_path / "run").exists()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "experiment_config.json").write_text("{}")
    open_run(tmp_path / "own", begin=False).close()
    assert [p.name for p in (tmp_path / "own").iterdir()] == ["experiment_config.json"]


def test_versions_that_changed_are_named(tmp_path):
    run = RunDirectory(tmp_path / "run", CONFIG, recipe="centralized-hf", resume=False)
    assert run.changed_versions({"torch": "1"}) == []
    run.begin({}, {"versions": {"torch": "1", "trl": "2"}})
    run.close()
    again = open_run(tmp_path / "run", resume=True, begin=False)
    assert again.changed_versions({"torch": "1", "trl": "3"}) == ["trl went from 2 to 3"]
    again.close()


def test_a_second_start_touches_nothing_of_the_first(tmp_path):
    """Before the first one's journal exists, and while a checkpoint of it is being written."""
    first = open_run(tmp_path / "run", begin=False)
    (tmp_path / "run" / ".staging-model").mkdir()
    for _ in range(2):
        with pytest.raises(RunDirectoryError, match="in use by another process"):
            open_run(tmp_path / "run")
    assert (tmp_path / "run" / ".staging-model").is_dir()
    assert (tmp_path / "run" / "run.lock").exists()
    first.close()
