"""Values of parameters for single tensors, computed by hand."""

import numpy as np
import pytest

from toolkit.merging.recipes.parameters import Levels, Resolver, converted, evaluate, gradient
from toolkit.merging.recipes.recipe import Condition, MergeRecipe, Setting
from toolkit.merging.recipes.recipe_file import read
from toolkit.merging.registry import merge_methods


def setting(*conditions: tuple) -> Setting:
    return Setting(tuple(Condition(*condition) for condition in conditions), "here")


@pytest.mark.parametrize(
    ("values", "t", "expected"),
    [
        ([0.0, 1.0], 0.25, 0.25),
        ([0.0, 0.5, 0.3, 0.7, 1.0], 0.0, 0.0),
        ([0.0, 0.5, 0.3, 0.7, 1.0], 1.0, 1.0),
        ([0.0, 0.5, 0.3, 0.7, 1.0], 0.375, 0.4),  # half way from 0.5 to 0.3
        ([0.0, 0.5, 0.3, 0.7, 1.0], 5 / 32, 0.3125),
        ([2.0], 0.7, 2.0),
        ([True, False], 0.9, True),
        ([True, False], 1.0, False),
        (["a", "b", "c"], 0.5, "b"),
        ([1, 4], 0.5, 2),  # whole numbers stay whole
    ],
)
def test_gradients(values, t, expected):
    assert gradient(values, t) == pytest.approx(expected, abs=1e-12)


def test_the_first_condition_that_fits_counts():
    found = setting((1, "self_attn"), ((0, 10), "mlp"), (3, "attn"), (4, None))
    assert evaluate(found, "model.layers.0.self_attn.q_proj.weight", 0.5, float) == 1
    assert evaluate(found, "model.layers.0.mlp.up_proj.weight", 0.5, float) == 5
    assert evaluate(found, "model.layers.0.cross_attn.weight", 0.5, float) == 3
    assert evaluate(found, "model.norm.weight", 0.5, float) == 4
    assert evaluate(setting((1, "mlp")), "model.norm.weight", 0.5, float) is None


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("1e-4", float, 1e-4),
        (1, float, 1.0),
        ("yes", bool, True),
        (0, bool, False),
        (3.0, int, 3),
        (7, str, "7"),
    ],
)
def test_values_are_converted(value, kind, expected):
    result = converted(value, kind)
    assert result == expected
    assert type(result) is kind


@pytest.mark.parametrize(
    ("value", "kind"),
    [("fast", float), (True, float), (float("inf"), float), (2.5, int), ("maybe", bool), (2, bool)],
)
def test_other_values_are_refused(value, kind):
    with pytest.raises(ValueError):
        converted(value, kind)


def resolver(method: str, *, parameters=None) -> Resolver:
    """A resolver that knows the filters and gradients of ``parameters``."""
    return Resolver(merge_methods()[method], MergeRecipe("r", "", method, parameters=parameters or {}))


def test_levels_from_source_to_recipe():
    levels = Levels(
        shared=({"lambda": setting((0.5,))}, {}, {"lambda": setting((0.9,)), "normalize": setting((False,))}),
        models=(
            ({"weight": setting((1.0,))}, {"weight": setting((2.0,))}, {"weight": setting((3.0,))}),
            ({}, {"weight": setting((2.0,))}, {"weight": setting((3.0,)), "density": setting((0.25,))}),
        ),
    )
    found = resolver("ties").arguments(levels, "x", ("x", "x"), 0.0)
    np.testing.assert_array_equal(found["weight"], [1.0, 2.0])
    np.testing.assert_array_equal(found["density"], [1.0, 0.25])
    assert (found["lambda_"], found["normalize"]) == (0.5, False)


def test_a_level_without_a_fitting_condition_is_passed_over():
    only_mlp, other = {"weight": setting((1.0, "mlp"))}, {"weight": setting((7.0,))}
    found = resolver("linear", parameters=only_mlp)
    levels = Levels((), ((only_mlp, other), (other,)))
    np.testing.assert_array_equal(found.arguments(levels, "a.mlp", ("a.mlp", "a.mlp"), 0)["weight"], [1, 7])
    np.testing.assert_array_equal(
        found.arguments(levels, "a.attn", ("a.attn", "a.attn"), 0)["weight"], [7, 7]
    )


def test_per_model_filters_look_at_the_models_own_names():
    by_layer = {"weight": setting((1.0, "layers.8."), (5.0,))}
    found = resolver("linear", parameters=by_layer)
    levels = Levels((by_layer,), ((by_layer,), (by_layer,)))
    arguments = found.arguments(levels, "layers.0.x", ("layers.8.x", "layers.0.x"), 0)
    np.testing.assert_array_equal(arguments["weight"], [1, 5])
    arguments = found.arguments(levels, "layers.0.x", ("layers.0.x", "layers.8.x"), 0)
    np.testing.assert_array_equal(arguments["weight"], [5, 1])


def test_equal_parameters_are_resolved_once():
    found = resolver("linear", parameters={"weight": setting(((0, 1),))})
    levels = Levels((), (({"weight": setting(((0, 1),))},),))
    first = found.arguments(levels, "a", ("a",), 0.5)
    assert found.arguments(levels, "b", ("b",), 0.5) is first
    assert found.arguments(levels, "b", ("b",), 0.75) is not first


def test_a_required_parameter_without_a_value_names_the_tensor():
    only_mlp = {"t": setting((1.0, "mlp"))}
    found = resolver("slerp", parameters=only_mlp)
    with pytest.raises(LookupError, match=r"'t' fits the tensor model\.norm"):
        found.arguments(Levels((only_mlp,), ((), ())), "model.norm", ("model.norm",) * 2, 0)


def test_defaults_are_those_of_mergekit(write_recipe):
    defaults = {
        "linear": {"normalize": True},
        "task_arithmetic": {"normalize": False, "lambda": 1.0},
        "ties": {"density": 1.0, "normalize": True, "lambda": 1.0},
        "dare_linear": {"density": 1.0, "rescale": True, "normalize": False},
        "dare_ties": {"density": 1.0, "rescale": True, "normalize": False},
        "della": {"epsilon": 0.15, "normalize": True, "rescale": True},
        "della_linear": {"epsilon": 0.15, "normalize": False, "rescale": True},
        "breadcrumbs": {"gamma": 0.01, "normalize": False},
        "breadcrumbs_ties": {"gamma": 0.01},
        "nuslerp": {"nuslerp_row_wise": False, "nuslerp_flatten": True},
        "sce": {"select_topk": 1.0},
    }
    for name, expected in defaults.items():
        found = {parameter.name: parameter.default for parameter in merge_methods()[name].parameters}
        assert {key: found[key] for key in expected} == expected, name


def test_fisher_paths_have_two_names(write_recipe):
    recipe = read(
        write_recipe(
            "merge_method: fisher\nmodels:\n"
            "  - {model: a, parameters: {fisher: [x, y]}}\n  - {model: b, parameters: {preconditioner_path: z}}\n"
        )
    )
    found = Resolver(merge_methods()["fisher"], recipe)
    levels = Levels((), tuple((entry.parameters,) for entry in recipe.models))
    assert found.fishers(levels, "t", ("t", "t"), 0.0) == ("x", "z")
    assert found.fishers(levels, "t", ("t", "t"), 1.0) == ("y", "z")
