"""--fp16 of iterative training: fp16 where there is a GPU, and no reason to fail where there is none."""

from toolkit.config.recipes import IterativeConfig
from toolkit.launch.plan import LaunchPlan, resolve_plan


def plan_of(*, environ: dict[str, str] | None = None, **options: object) -> LaunchPlan:
    return resolve_plan(IterativeConfig.model_validate({"locales": ["en-US"], **options}), environ or {})


def test_a_cpu_computes_in_float32_and_the_plan_says_so(machine) -> None:
    machine(0)
    plan = plan_of(fp16=True)
    assert plan.mixed_precision == "no"
    assert "mixed precision no: --fp16 is for GPUs" in plan.notes


def test_a_gpu_computes_in_fp16(machine) -> None:
    machine(1)
    plan = plan_of(fp16=True)
    assert plan.mixed_precision == "fp16"
    assert "mixed precision fp16: --fp16" in plan.notes
    assert plan_of().mixed_precision == "bf16"


def test_it_wins_over_what_a_launcher_was_told(machine) -> None:
    machine(1)
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    environ = {**world, "ACCELERATE_MIXED_PRECISION": "bf16"}
    assert plan_of(environ=environ).mixed_precision == "bf16"
    plan = plan_of(environ=environ, fp16=True)
    assert plan.mixed_precision == "fp16"
    assert any(note.startswith("--fp16 wins over bf16, which ") for note in plan.notes)
