"""Iterative training from Python, by the names of the document that asked for it.

Also as a script: python tests/test_iterative_training.py
"""

import json
import subprocess
import sys

import pytest

import toolkit
from toolkit.errors import ConfigError, InputError, RunDirectoryError

SMALL = {"batch_size": 8, "lora_r": 4, "learning_rate": 1e-2, "cpu": True}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_encoder, intent_data):
    """A finished run of two locales and two merges."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = toolkit.create_default_config(
        ["en-US", "fr-FR"],
        training=toolkit.IterativeTrainingConfig(
            model=str(tiny_encoder), data=str(intent_data), max_epochs=2
        ),
        merge=toolkit.IterativeMergeConfig(merge_frequency=1, weight_calculation="average"),
        output_dir=folder,
        baselines=False,
        **SMALL,
    )
    toolkit.IterativeTrainingOrchestrator(config).train()
    return folder


def test_importing_brings_no_torch():
    code = "import sys, toolkit; toolkit.create_default_config(['en-US']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_public_name_is_there():
    for name in toolkit.__all__:
        assert getattr(toolkit, name) is not None
    with pytest.raises(AttributeError, match="has no attribute"):
        _ = toolkit.NothingOfThatName


def test_custom_weights_of_the_document():
    custom_weights = {"en-US": 0.4, "fr-FR": 0.3, "de-DE": 0.3}
    calculator = toolkit.IterativeWeightCalculator(
        active_model_states=dict.fromkeys(custom_weights),
        target_locales=["en-US", "fr-FR"],
        custom_weights=custom_weights,
    )
    assert calculator.calculate() == pytest.approx(custom_weights)


def test_custom_schedule_of_the_document():
    scheduler = toolkit.AdaptiveMergeScheduler(
        base_merge_frequency=3, convergence_threshold=1e-4, min_merge_frequency=1, max_merge_frequency=10
    )
    decision = scheduler.evaluate_merge_necessity(current_epoch=5, active_locales=["en-US", "fr-FR"])
    assert decision.should_merge
    assert decision.reason
    assert decision.recommended_frequency == 3


def test_a_default_configuration_takes_groups_and_options():
    config = toolkit.create_default_config(
        ["en-US", "fr-FR"],
        training=toolkit.IterativeTrainingConfig(learning_rate=3e-4, batch_size=4),
        merge=toolkit.IterativeMergeConfig(
            merge_frequency=5, merge_algorithm="ties", merge_parameters={"density": 0.5}
        ),
        batch_size=8,
    )
    assert (config.learning_rate, config.batch_size, config.merge_frequency) == (3e-4, 8, 5)
    assert config.model == "sample:multilingual-e5-small"
    with pytest.raises(ConfigError, match="merge_frequency"):
        toolkit.create_default_config(["en-US"], merge_frequncy=2)
    with pytest.raises(ConfigError, match="manual_weights"):
        toolkit.create_default_config(["en-US", "fr-FR"], weight_calculation="manual")


def test_what_a_run_has_left(run_dir):
    state = toolkit.TrainingStateManager(run_dir)
    assert state.is_finished
    assert state.locales == ["en-US", "fr-FR"]
    assert [merge["epoch"] for merge in state.merges()] == [1, 2]
    assert [decision["should_merge"] for decision in state.decisions()] == [True, True]
    assert state.merges()[0]["weights"] == {"en-US,fr-FR": {"en-US": 0.5, "fr-FR": 0.5}}
    assert state.last_commit()["epoch"] == 2
    assert state.checkpoint("fr-FR").name == "checkpoint-00000006-merges-2"
    assert len(state.merged_models()) == 2
    assert state.summary()["participants"].keys() == {"en-US", "fr-FR"}
    assert state.final_statistics()["status"] == "done"
    with pytest.raises(RunDirectoryError, match="holds no run"):
        toolkit.TrainingStateManager(run_dir / "en-US")


def test_a_weighting_a_schedule_and_a_method_of_ones_own(tmp_path, tiny_encoder, intent_data):
    from toolkit.merging.registry import MergeMethod, merge_methods
    from toolkit.rounds.schedule import FixedFrequency, schedules
    from toolkit.rounds.weighting import weightings

    if "only_the_last" not in weightings():

        @toolkit.weighting("only_the_last")
        def only_the_last(inputs):
            """All weight on the last source."""
            return {source: float(source == inputs.sources[-1]) for source in inputs.sources}

        @toolkit.schedule("second_epoch_only")
        def second_epoch_only(config):
            return FixedFrequency(2)

    assert "second_epoch_only" in schedules()
    assert isinstance(merge_methods()["linear"], MergeMethod)
    config = toolkit.create_default_config(
        ["en-US", "fr-FR"],
        model=str(tiny_encoder),
        data=str(intent_data),
        max_epochs=3,
        weight_calculation="only_the_last",
        schedule="second_epoch_only",
        baselines=False,
        output_dir=tmp_path / "run",
        **SMALL,
    )
    state = toolkit.IterativeTrainingOrchestrator(config).train()
    (merge,) = state.merges()
    assert merge["epoch"] == 2
    assert merge["weights"] == {"en-US,fr-FR": {"en-US": 0.0, "fr-FR": 1.0}}


def test_merging_after_training_by_the_similarity_of_languages(run_dir, tmp_path, meldkit):
    common = ["merge-locales", "--models-dir", run_dir, "--target-lang", "sq-AL"]
    done = meldkit(*common, "--mode", "similarity", "--num-languages", 2, "--out", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert "fr-FR" in done.stdout
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert len(report["inputs"]) == 2
    for options, words in (
        (("--num-languages", 5), "there are 2 models"),
        (("--mode", "manual"), "belong together"),
        (("--mode", "average", "--num-languages", 2), "needs --mode similarity"),
    ):
        wrong = meldkit(*common, *options)
        assert wrong.returncode == 2
        assert words in wrong.stderr


def test_a_folder_without_models_is_refused(tmp_path):
    from toolkit.rounds.merge_locales import models_of

    with pytest.raises(InputError, match="no models of locales"):
        models_of(tmp_path)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v", *sys.argv[1:]]))
