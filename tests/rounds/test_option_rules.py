"""Names of merge methods, weightings and schedules in the options, and the parameters of methods."""

import pytest

from toolkit.config.load import load
from toolkit.config.recipes import IterativeConfig
from toolkit.errors import ConfigError, InputError
from toolkit.merging.registry import METHODS, merge_method, merge_methods
from toolkit.rounds.option_rules import ALGORITHMS_OF_ROUNDS, BUILT_IN_WEIGHTINGS, check_languages
from toolkit.rounds.schedule import schedule
from toolkit.rounds.schedule.registry import _SCHEDULES
from toolkit.rounds.weighting import weighting, weightings
from toolkit.rounds.weighting.registry import _WEIGHTINGS

TWO = "--locales en-US,fr-FR"
THREE = "--locales en-US,fr-FR,de-DE"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(flags: str) -> IterativeConfig:
    return load(IterativeConfig, flags.split()).config


def problems(flags: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(flags)
    return caught.value.problems


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (f"{TWO} --merge-algorithm teis", "--merge-algorithm: 'teis' is not one of "),
        (
            f"{THREE} --merge-algorithm slerp --merge-parameters t=0.5",
            "--merge-algorithm: slerp merges 2 models, and",
        ),
        (f"{TWO} --merge-algorithm slerp", "merge_parameters: lacks t, which slerp needs: t=0.5"),
        (f"{TWO} --merge-algorithm regmean", "--merge-algorithm: regmean reads files (gram)"),
        (
            "--locales en-US --merge-algorithm model_stock",
            "--merge-algorithm: model_stock merges at least 2 models",
        ),
        (
            f"{TWO} --merge-algorithm passthrough",
            "--merge-algorithm: passthrough merges 1 models, and there are 2",
        ),
        (
            f"{TWO} --merge-parameters densty=1",
            "--merge-parameters densty: linear has no such parameter (normalize)",
        ),
        (
            f"{TWO} --merge-algorithm ties --merge-parameters densty=1",
            "--merge-parameters densty: ties has no such parameter; did you mean 'density'? (density, lambda, norm",
        ),
        (f"{TWO} --merge-parameters weight=1", "--merge-parameters weight: comes from weight_calculation"),
        (
            f"{TWO} --merge-algorithm ties --merge-parameters density=1.5",
            "--merge-parameters density: 1.5 does not lie between 0 and 1",
        ),
        (
            f"{TWO} --merge-algorithm ties --merge-parameters density=half",
            "--merge-parameters density: 'half' is not a number",
        ),
        (
            f"{TWO} --merge-algorithm ties --merge-parameters density=[0.5,0.2]",
            "--merge-parameters density: [0.5, 0.2] is not a number",
        ),
        (f"{TWO} --merge-parameters normalize=1", "--merge-parameters normalize: 1 is not true or false"),
        (
            f"{TWO} --merge-algorithm karcher --merge-parameters max_iter=1.5",
            "--merge-parameters max_iter: 1.5 is not a whole number",
        ),
        (
            f"{TWO} --merge-algorithm fisher_dataset --merge-parameters fisher_normalize=7",
            "--merge-parameters fisher_normalize: 7 is not text",
        ),
        (
            f"{TWO} --merge-algorithm model_stock --weight-calculation average",
            "--weight-calculation: does nothing with merge_algorithm: model_stock, which has no weights",
        ),
        (
            f"{TWO} --merge-algorithm sce --similarity-top-k 1",
            "--similarity-top-k: does nothing with merge_algorithm: sce, which has no weights",
        ),
        (
            f"{TWO} --merge-algorithm sce --target-languages fr-FR",
            "--target-languages: does nothing with merge_algorithm: sce, which has no weights",
        ),
        (
            f"{TWO} --weight-calculation similarty",
            "--weight-calculation: 'similarty' is not one of average, ",
        ),
        (
            f"{TWO} --schedule adaptiv",
            "--schedule: 'adaptiv' is not one of adaptive, fixed; did you mean 'adaptive'?",
        ),
    ],
)
def test_names_that_are_none(flags, message):
    found = problems(flags)
    assert len(found) == 1, found
    assert found[0].startswith(message)


def test_an_unknown_algorithm_lists_all_and_names_the_nearest():
    (found,) = problems(f"{TWO} --merge-algorithm dare_tise")
    assert found.endswith("; did you mean 'dare_ties'?")
    for name in ("linear", "fisher_simple", "fisher_dataset", "from_optimizer", "ties", "model_stock"):
        assert f" {name}," in found


def usable_methods() -> list[str]:
    return sorted(
        {*merge_methods(), *ALGORITHMS_OF_ROUNDS} - {"regmean", "passthrough", "nearswap", "arcee_fusion"}
    )


@pytest.mark.parametrize("name", usable_methods())
def test_every_method_that_merges_two_models_may_be_named(name):
    needed = " --merge-parameters t=0.5" if name == "slerp" else ""
    assert read(f"{TWO} --merge-algorithm {name}{needed}").merge_method in merge_methods()


def test_problems_come_together_with_those_of_other_options():
    assert len(problems(f"{TWO} --merge-algorithm teis --gate-tolerance 1 --schedule none_such")) == 3


def test_what_is_registered_in_python_is_known():
    @merge_method("mine", paper="none")
    def mine(group):
        """Mine."""

    @weighting("mine")
    def my_weights(inputs):
        """Mine."""

    @schedule("mine")
    def my_schedule(config):
        """Mine."""

    try:
        config = read(f"{TWO} --merge-algorithm mine --schedule mine")
        assert (config.merge_algorithm, config.schedule) == ("mine", "mine")
        assert read(f"{TWO} --weight-calculation mine").weighting == "mine"
    finally:
        del METHODS["mine"], _WEIGHTINGS["mine"], _SCHEDULES["mine"]


def test_the_built_in_weightings_are_those_of_the_registry():
    assert set(BUILT_IN_WEIGHTINGS) == set(weightings())


def test_languages_are_looked_up_before_a_run():
    check_languages(read(f"{TWO} --target-languages sq-AL"))
    with pytest.raises(InputError, match="xq"):
        check_languages(read("--locales en-US,xq-XX"))
    with pytest.raises(InputError, match="xq"):
        check_languages(read(f"{TWO} --target-languages xq-XX"))
    with pytest.raises(InputError, match="syntax_average: too little is known about"):
        check_languages(read("--locales en-US,fil-PH --similarity-features syntax_average"))
