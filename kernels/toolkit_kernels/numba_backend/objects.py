"""Machine code of the kernels: compiled once by numba, kept in the user's cache folder, and loaded without numba.

A function becomes an object file, which LLVM loads in milliseconds; numba is imported only to make one. A file's folder
is named after all that decides about its bytes: the sources of this package, the versions, the processor and its
features. So another processor, or another version, finds nothing there and compiles for itself. A file begins with the
SHA-256 of its code and is renamed into place when complete; one that is damaged is made again. Where nothing can be
written, or where others could write, code is made for this process alone.
"""

import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import os
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm

DIGEST_SIZE = hashlib.sha256().digest_size

_lock = threading.Lock()
_engines: list[llvm.ExecutionEngine] = []  # loaded code lives as long as its engine


def load(module: str, name: str, num_arguments: int) -> Callable[..., int]:
    """The compiled function ``name`` of a module of this package: int64 arguments and result; runs without the
    interpreter lock."""
    with _lock:
        return _load(module, name, num_arguments)


def check() -> None:
    """Raises ImportError or OSError where numba cannot be imported and may be needed.

    Code in the cache, made with the same versions, shows that it can: then it is not imported here either.
    """
    folder = cache_folder()
    if folder is None or not any(folder.glob("*.o")):
        import numba  # noqa: F401 - whether that works is all we ask


@functools.cache
def _load(module: str, name: str, num_arguments: int) -> Callable[..., int]:
    folder = cache_folder()
    path = folder / f"{name}.o" if folder else None
    code = _read(path) if path else None
    if code is None:
        code = _compile(module, name, num_arguments)
        if path:
            _write(path, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    integers = [ctypes.c_int64] * num_arguments
    return ctypes.CFUNCTYPE(ctypes.c_int64, *integers)(engine.get_function_address(name))


@functools.cache
def _target_machine_options() -> dict:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    return {
        "cpu": llvm.get_host_cpu_name(),
        "features": features,
        "codemodel": "jitdefault",
        "jit": True,
        "opt": 3,
    }


def _target_machine() -> llvm.TargetMachine:
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(**_target_machine_options())


def _compile(module: str, name: str, num_arguments: int) -> bytes:
    """The object file of a function that takes and returns int64 and raises nothing."""
    import numba

    function = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    signature = numba.int64(*[numba.int64] * num_arguments)
    options: dict = {"nopython": True, "boundscheck": False, "error_model": "numpy"}
    compiled = numba.cfunc(signature, **options)(function)
    # numba's wrapper for C calls Python to report errors. Ours does not, since there are none.
    inner = compiled.native_name.removeprefix("cfunc.")
    arguments = ", ".join(f"i64 %a{i}" for i in range(num_arguments))
    wrapper = f"""
        define i64 @{name}({arguments}) {{
            %result = alloca i64
            %status = call i32 @{inner}(ptr %result, ptr null, {arguments})
            %value = load i64, ptr %result
            ret i64 %value
        }}"""
    code = llvm.parse_assembly(compiled.inspect_llvm() + wrapper)
    for member in code.functions:
        if not member.is_declaration and member.name != name:
            member.linkage = "internal"
    machine = _target_machine()
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(code, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    needs = [f.name for f in code.functions if f.is_declaration and not f.name.startswith("llvm.")]
    if needs:  # loading such an object ends the process
        raise AssertionError(f"{name} calls {', '.join(needs)}")
    return machine.emit_object(code)


# --- files


@functools.cache
def cache_folder() -> Path | None:
    """The folder for exactly this code on this processor; None where there is no safe one."""
    key = _key()
    try:
        folder = _user_folder() / "kernels" / key
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except (OSError, RuntimeError):  # the latter where the user has no home
        return None
    safe = os.name != "posix" or (
        state.st_uid == os.geteuid() and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )
    return folder if safe else None


def _user_folder() -> Path:
    """As toolkit.cache_folder, which kernels do not import."""
    if chosen := os.environ.get("MELDKIT_CACHE"):
        return Path(chosen).expanduser()
    shared = Path(os.environ.get("XDG_CACHE_HOME", "")).expanduser()
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "meldkit"


def _key() -> str:
    sources = {path.name: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")}
    settings = {name: value for name, value in os.environ.items() if name.startswith("NUMBA_")}
    packages = [importlib.metadata.version(name) for name in ("numba", "numpy")]
    versions = (llvmlite.__version__, *packages, llvm.get_process_triple())
    everything = (
        sorted(sources.items()),
        sorted(settings.items()),
        versions,
        sorted(_target_machine_options().items()),
    )
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:DIGEST_SIZE], content[DIGEST_SIZE:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """A cache that cannot be written is no error."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    except OSError:
        return
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
