"""The shape of the house: what lies where, who may import whom, what a wheel holds."""

import ast
import configparser
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = {"toolkit": ROOT / "toolkit", "toolkit_kernels": ROOT / "kernels" / "toolkit_kernels"}
# Folders outside the source roots that a wheel carries as data: no module lies in them.
DATA_PACKAGES = {"toolkit.recipe_files": ROOT / "recipes" / "configs"}
FOLDERS_OF_SCRIPTS = ("kernels", "recipes", "scripts", "tests", "bench")

# Arrows point down only: a module imports from its own layer or one below, never one above. A new package,
# or a new module directly under toolkit/, gets its place here.
LAYERS = (
    {"cli", "__main__", "iterative", "trials"},
    {"rounds", "federated", "benchmarks"},
    {"training", "merging", "evaluation"},
    {"modeling", "data", "languages"},
    {"toolkit_kernels", "config", "launch", "reporting", "collection", "wheels"},
    {"cache_folder", "dependencies", "durable", "errors", "paths", "terminal"},
)

# What --help, --dry-run and every configuration error pass through: answers in a fraction of a second.
TORCH_FREE = (
    "benchmarks",
    "cache_folder",
    "dependencies",
    "errors",
    "durable",
    "paths",
    "config",
    "launch",
    "languages",
    "cli",
    "__main__",
    "terminal",
    "wheels",
    "collection",
    "merging.adapter_merge",
    "merging.commands",
    "merging.fisher.commands",
    "merging.group",
    "merging.merge_progress",
    "merging.order",
    "merging.plan",
    "merging.recipes",
    "merging.registry",
    "merging.streaming",
    "reporting.records",
    "reporting.resources",
    "reporting.trackers",
    "rounds.comparison",
    "rounds.option_rules",
    "rounds.schedule",
    "rounds.weighting",
    "evaluation.bootstrap",
)
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "pandas",
}

# --- what the tests read


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the distribution: dotted name -> file."""
    found = {}
    for package, folder in SOURCE_ROOTS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(node: ast.AST, *, module: str, is_package: bool, everywhere: bool) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) of each import; without ``everywhere`` only of those that run on loading."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield alias.name, child.lineno
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:  # from . import x
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - child.level + 1], *([base] if base else [])])
            yield base, child.lineno
            for alias in child.names:
                yield f"{base}.{alias.name}", child.lineno
        elif everywhere:
            yield from imports(child, module=module, is_package=is_package, everywhere=True)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for otherwise in child.orelse:
                yield from imports(otherwise, module=module, is_package=is_package, everywhere=False)
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, module=module, is_package=is_package, everywhere=False)


def imports_of(module: str, *, everywhere: bool) -> list[tuple[str, int]]:
    path = modules()[module]
    is_package = path.name == "__init__.py"
    return list(imports(tree_of(path), module=module, is_package=is_package, everywhere=everywhere))


def part_of(module: str) -> str | None:
    """The part of the house that a dotted name belongs to: config, data, ..., None for what is not ours."""
    first, _, rest = module.partition(".")
    if first == "toolkit_kernels":
        return first
    return rest.partition(".")[0] or None if first == "toolkit" else None


def layer_of(part: str) -> int:
    """0 is the lowest layer."""
    for height, parts in enumerate(reversed(LAYERS)):
        if part in parts:
            return height
    raise AssertionError(f"toolkit.{part} has no place in LAYERS of tests/test_layout.py: give it one")


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of a graph as the list of its nodes, the first one again at the end; [] if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if cycle := visit(target, [*path, node]):
                return cycle
        done.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def packages_on_disk() -> set[str]:
    return {name for name, path in modules().items() if path.name == "__init__.py"}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# --- folders and packages


@pytest.mark.parametrize("folder", FOLDERS_OF_SCRIPTS)
def test_folders_of_scripts_are_no_packages(folder: str) -> None:
    # A kernels/__init__.py hides Hugging Face's package of that name and breaks AutoModelForCausalLM.
    own = ROOT / "kernels" / "toolkit_kernels"
    assert [str(p) for p in (ROOT / folder).rglob("__init__.py") if own not in p.parents] == []


@pytest.mark.parametrize("folder", FOLDERS_OF_SCRIPTS)
def test_no_script_has_the_name_of_a_library(folder: str) -> None:
    # `python bench/x.py` puts bench/ first on the path: a bench/kernels.py there broke the import of transformers.
    libraries = {Requirement(text).name for text in pyproject()["project"]["dependencies"]} | {
        "kernels",
        "triton",
    }
    assert {p.stem for p in (ROOT / folder).glob("*.py")} & {
        name.replace("-", "_") for name in libraries
    } == set()


def test_setup_cfg_lists_the_packages_that_exist() -> None:
    assert set(setup_cfg()["options"]["packages"].split()) == packages_on_disk() | set(DATA_PACKAGES)
    assert [str(p) for folder in DATA_PACKAGES.values() for p in folder.rglob("*.py")] == []


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {p.parent for root in SOURCE_ROOTS.values() for p in root.rglob("*.py")}
    assert [str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_no_module_is_a_drawer_for_everything() -> None:
    assert [
        str(p) for p in modules().values() if p.stem in {"utils", "util", "helpers", "misc", "common"}
    ] == []


@pytest.mark.slow
def test_models_build_with_the_root_of_the_checkout_on_the_path() -> None:
    program = (
        "from transformers import AutoModelForCausalLM, LlamaConfig\n"
        "config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,"
        " num_attention_heads=1)\n"
        "print(type(AutoModelForCausalLM.from_config(config)).__name__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "LlamaForCausalLM", result.stderr[-2000:]


# --- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy, so that the checkout stays as it is."""
    copy = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("toolkit", "kernels", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(copy / "dist"),
        str(copy),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (path,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def in_wheel(path: Path) -> str:
    for package, folder in (SOURCE_ROOTS | DATA_PACKAGES).items():
        if path.is_relative_to(folder):
            return f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}"
    raise AssertionError(path)


def test_the_wheel_holds_our_two_names_and_no_other(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"toolkit", "toolkit_kernels"}


def test_the_wheel_holds_every_module_and_every_data_file(wheel: zipfile.ZipFile) -> None:
    on_disk = {
        in_wheel(path)
        for folder in (*SOURCE_ROOTS.values(), *DATA_PACKAGES.values())
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert on_disk - set(wheel.namelist()) == set()


def test_the_wheel_brings_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    assert b"meldkit = toolkit.__main__:main" in wheel.read(entry_points)
    assert any(name.endswith("LICENSE") for name in wheel.namelist())


# --- versions


def test_the_version_stands_in_pyproject_only() -> None:
    version = pyproject()["project"]["version"]
    assert importlib.metadata.version("meldkit") == version, (
        "run `make setup`: the installed metadata is older"
    )
    assert not setup_cfg().has_option("metadata", "version")
    literals = [
        where(path, node.lineno)
        for path in modules().values()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        if "__version__" in map(ast.unparse, node.targets)
    ]
    assert literals == [], 'ask importlib.metadata.version("meldkit")'


def constraints() -> dict[str, str]:
    files = (ROOT / "constraints.txt", ROOT / "constraints-cpu.txt")
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonical(name): version for name, version in pins}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_tested_versions_lie_in_the_ranges_of_the_metadata() -> None:
    project = pyproject()["project"]
    requirements = [
        *project["dependencies"],
        *(r for e in project["optional-dependencies"].values() for r in e),
    ]
    not_tested = {
        "meldkit",
        "trackio",
        "wandb",
    }  # meldkit is `all`; the two trackers are installed by no target
    pins = constraints()
    wrong = []
    for requirement in map(Requirement, requirements):
        name = canonical(requirement.name)
        if name not in not_tested and (name not in pins or pins[name] not in requirement.specifier):
            wrong.append(f"{requirement}: tested with {pins.get(name)}")
    assert wrong == [], "\n".join(wrong)


# --- who imports whom


def test_arrows_point_down() -> None:
    wrong = []
    for module, path in modules().items():
        part = part_of(module)
        for target, line in imports_of(module, everywhere=True):
            target_part = part_of(target)
            if part is None or target_part is None or target_part == part:
                continue
            if layer_of(target_part) <= layer_of(part):
                continue
            wrong.append(f"{where(path, line)}: {part} imports {target_part}, which stands above it")
    assert wrong == [], "\n".join(wrong)


def test_every_part_has_a_layer() -> None:
    for module in modules():
        if part := part_of(module):
            layer_of(part)


def test_kernels_know_nothing_of_the_toolkit() -> None:
    wrong = [
        where(modules()[module], line)
        for module in modules()
        if module.startswith("toolkit_kernels")
        for target, line in imports_of(module, everywhere=True)
        if target.split(".")[0] == "toolkit"
    ]
    assert wrong == [], "\n".join(wrong)


def test_no_cycles_between_the_parts() -> None:
    graph: dict[str, set[str]] = {}
    for module in modules():
        if part := part_of(module):
            targets = {part_of(target) for target, _ in imports_of(module, everywhere=True)}
            graph.setdefault(part, set()).update(t for t in targets if t and t != part)
    assert find_cycle(graph) == []


def test_no_cycles_between_modules() -> None:
    graph = {
        module: {
            target
            for target, _ in imports_of(module, everywhere=False)
            if target in modules() and target != module and not module.startswith(f"{target}.")
        }
        for module in modules()
    }
    assert find_cycle(graph) == []


def test_a_cycle_is_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


# --- what must stay light


def torch_free_modules() -> list[str]:
    zones = tuple(f"toolkit.{zone}" for zone in TORCH_FREE)
    return [
        m for m in modules() if m == "toolkit" or m in zones or m.startswith(tuple(f"{z}." for z in zones))
    ]


def test_light_modules_do_not_name_torch_where_they_load() -> None:
    wrong = [
        f"{where(modules()[module], line)}: {target}"
        for module in torch_free_modules()
        for target, line in imports_of(module, everywhere=False)
        if target.split(".")[0] in HEAVY
    ]
    assert wrong == [], "\n".join(wrong)


def test_light_modules_do_not_pull_torch_in() -> None:
    program = (
        "import importlib, sys\n"
        f"for name in {torch_free_modules()!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = {HEAVY!r} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
