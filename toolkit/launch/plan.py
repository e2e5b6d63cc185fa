"""The launch plan: devices, processes, precision, DeepSpeed. Decided once, before torch is imported, with
reasons.

``resolve_plan`` is called by every way of starting a run. Called before a launcher it decides; called in a
process that a launcher started it adopts that world and checks it against the options. The same request
gives the same ``LaunchPlan.as_dict()`` either way.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from toolkit.config.iterative_options import HalfPrecisionOptions
from toolkit.config.options import LaunchOptions, Options, QuantizationOptions, TrainingOptions
from toolkit.dependencies import is_installed
from toolkit.errors import LaunchError, MissingDependencyError
from toolkit.launch import deepspeed, devices
from toolkit.launch.world import LaunchedWorld, is_launched, launched_world

__all__ = ["LaunchPlan", "is_launched", "resolve_plan"]

Device = Literal["cpu", "cuda"]
MixedPrecision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class LaunchPlan:
    """What is launched.

    Attributes:
        device: ``cuda`` (NVIDIA GPUs) or ``cpu``.
        gpus: the GPUs of one machine, one a process, as CUDA_VISIBLE_DEVICES names them; empty on a CPU.
        num_processes: on all machines together.
        num_machines: more than 1 only in a world that a launcher made.
        mixed_precision: type of the computation.
        deepspeed: ``zero1``, ``zero2``, ``zero3``, the absolute path of a configuration, or None.
        zero_stage: ZeRO stage of ``deepspeed`` (0 to 3); None without DeepSpeed.
        quant_storage: dtype in which 4-bit weights must be stored (ZeRO-3 shards them as such); else None.
        threads_per_process: CPU threads of each process.
        main_process_port: port on which the processes meet; 0: a free one.
        notes: every decision with its reason. Not in :meth:`as_dict`: they tell how the run was started.
    """

    device: Device
    gpus: tuple[str, ...]
    num_processes: int
    num_machines: int
    mixed_precision: MixedPrecision
    deepspeed: str | None
    zero_stage: int | None
    quant_storage: str | None
    threads_per_process: int
    main_process_port: int
    notes: tuple[str, ...]

    @property
    def needs_launcher(self) -> bool:
        """Whether processes must be started: more than one, or DeepSpeed, which wants a process group."""
        return self.num_processes > 1 or self.deepspeed is not None

    def as_dict(self) -> dict[str, Any]:
        """The decisions as JSON values: the same for the same request, however the run was started."""
        values = asdict(self) | {"gpus": list(self.gpus)}
        del values["notes"]
        return values

    def environment(self) -> dict[str, str]:
        """Environment variables that a process of this plan needs before torch is imported."""
        variables = {"OMP_NUM_THREADS": str(self.threads_per_process)}
        if self.device == "cuda":
            variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        else:
            variables["CUDA_VISIBLE_DEVICES"] = ""
        if self.deepspeed is not None:
            variables |= deepspeed.environment(self.device)
        elif self.device == "cpu":
            # Never together with DeepSpeed: accelerate then switches DeepSpeed off without a word.
            variables["ACCELERATE_USE_CPU"] = "true"
            if is_installed("deepspeed"):
                # accelerate imports it also where it is not used, and told nothing it warns of having no GPU.
                variables["DS_ACCELERATOR"] = "cpu"
        return variables


def resolve_plan(config: Options, environ: Mapping[str, str] = os.environ) -> LaunchPlan:
    """Decide devices, processes, precision and DeepSpeed.

    Args:
        config: a recipe's configuration; its launch and quantization options are read.
        environ: the environment, in which launchers leave their world and CUDA_VISIBLE_DEVICES may stand.

    Raises:
        LaunchError: what is asked for is not here or contradicts itself, or the launcher that started this
            process made another world than the options ask for.
        MissingDependencyError: DeepSpeed or bitsandbytes is asked for and not installed.
    """
    options = config if isinstance(config, LaunchOptions) else LaunchOptions.model_validate({})
    started = launched_world(environ)
    notes: list[str] = []
    if started is not None:
        notes.append(f"started by {started.launcher}: {_processes(started.num_processes)}")
    gpus = _choose_gpus(options, environ, started, notes)
    num_processes = _num_processes(options, gpus, started, notes)
    num_machines = started.num_machines if started else 1
    num_local_processes = num_processes // num_machines
    if len(gpus) > num_local_processes:
        unused = ", ".join(gpu.name for gpu in gpus[num_local_processes:])
        notes.append(f"{_processes(num_local_processes)}, one GPU each: GPU {unused} stays unused")
        gpus = gpus[:num_local_processes]
    device: Device = "cuda" if gpus else "cpu"
    source = _deepspeed_source(options, started, notes)
    precision = _mixed_precision(options, gpus, started, notes)
    stage = deepspeed.check(source, config, device=device, mixed_precision=precision, notes=notes)
    quant_storage = _check_quantization(config, stage, precision, notes)
    return LaunchPlan(
        device=device,
        gpus=tuple(gpu.name for gpu in gpus),
        num_processes=num_processes,
        num_machines=num_machines,
        mixed_precision=precision,
        deepspeed=source,
        zero_stage=stage,
        quant_storage=quant_storage,
        threads_per_process=_threads_per_process(environ, num_local_processes, started, notes),
        main_process_port=options.main_process_port or 0,
        notes=tuple(notes),
    )


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _choose_gpus(
    options: LaunchOptions, environ: Mapping[str, str], started: LaunchedWorld | None, notes: list[str]
) -> list[devices.Gpu]:
    """GPUs to use, or none: then the CPU."""
    if options.cpu or (started is not None and started.asks_cpu and options.gpu is None):
        notes.append("device cpu: --cpu was given" if options.cpu else "device cpu: the launcher was told so")
        return []
    on_machine = devices.machine_gpus()
    if not on_machine:
        ignored = f"; --gpu {options.gpu} is ignored, training on the CPU" if options.gpu is not None else ""
        notes.append(f"device cpu: no NVIDIA GPU here{ignored}")
        return []
    if started is not None and started.asks_cpu:
        raise LaunchError(
            f"--gpu {options.gpu}, but {started.launcher} was told to use the CPU",
            hint="leave out --gpu, or the --cpu of the launcher",
        )
    visible = devices.visible_gpus(on_machine, environ)
    gpus = visible if options.gpu is None else devices.asked_gpus(options.gpu, on_machine, visible, environ)
    if not gpus:
        notes.append(
            f"device cpu: CUDA_VISIBLE_DEVICES={environ.get('CUDA_VISIBLE_DEVICES')!r} hides the GPUs"
        )
        return []
    build = devices.torch_build()
    if devices.torch_is_cpu_only(build):
        raise LaunchError(
            f"this machine has a GPU ({on_machine[0].model}), but torch {build} was built for CPUs only",
            hint="install a CUDA build of torch (`make clean setup` chooses it), or train with --cpu",
        )
    why = f"--gpu {options.gpu}" if options.gpu is not None else "all GPUs that are visible"
    if len(gpus) > 1 and any(gpu.is_slice for gpu in gpus):
        if options.gpu is not None:
            raise LaunchError(
                f"--gpu {options.gpu}: CUDA shows a process one MIG slice only, and these are several",
                hint="choose one slice, e.g. --gpu 0",
            )
        gpus = [gpu for gpu in gpus if not gpu.is_slice] or gpus[:1]
        why = "CUDA shows a process one MIG slice only; --gpu chooses another"
    notes.append(f"device cuda: {why}: {', '.join(f'{gpu.name} ({gpu.model})' for gpu in gpus)}")
    return gpus


def _num_processes(
    options: LaunchOptions, gpus: list[devices.Gpu], started: LaunchedWorld | None, notes: list[str]
) -> int:
    asked = options.num_processes
    if started is not None:
        if asked is not None and asked != started.num_processes:
            raise LaunchError(
                f"--num-processes {asked}, but {started.launcher} started "
                f"{_processes(started.num_processes)} (WORLD_SIZE={started.num_processes})",
                hint="give both the same number, or start with `meldkit train`, which launches them itself"
                " (accelerate launch --cpu starts one process, whatever --num_processes says)",
            )
        count, num_local = started.num_processes, started.num_processes_per_machine
    else:
        useful = min(len(gpus), getattr(options, "max_processes", len(gpus)))
        count = num_local = asked if asked is not None else max(1, useful)
        why = "--num-processes" if asked is not None else "one for each GPU" if gpus else "one on a CPU"
        if asked is None and useful < len(gpus):
            why = "more would have nothing to train"
        notes.append(f"{_processes(count)}: {why}")
    if gpus and num_local > len(gpus):
        raise LaunchError(
            f"{_processes(num_local)}, but {len(gpus)} GPU{'s' if len(gpus) > 1 else ''} to use "
            f"({', '.join(gpu.name for gpu in gpus)}); two processes cannot share a GPU",
            hint=f"--num-processes {len(gpus)}, more GPUs with --gpu, or --cpu",
        )
    return count


def _mixed_precision(
    options: LaunchOptions, gpus: list[devices.Gpu], started: LaunchedWorld | None, notes: list[str]
) -> MixedPrecision:
    asked, flag = options.mixed_precision, f"--mixed-precision {options.mixed_precision}"
    if isinstance(options, HalfPrecisionOptions) and options.fp16:
        if not gpus:
            notes.append("mixed precision no: --fp16 is for GPUs")
            return "no"
        asked, flag = "fp16", "--fp16"
    given = started.mixed_precision if started else None
    # accelerate launch says "no" also where nobody said anything, so only bf16 and fp16 are somebody's wish.
    if asked == "auto" and given in ("bf16", "fp16"):
        precision: MixedPrecision = given
        if started and not started.is_ours:
            notes.append(f"mixed precision {given}: {started.launcher} was told so")
    elif asked != "auto":
        precision = asked
        notes.append(f"mixed precision {asked}: {flag.split()[0]}")
        if given is not None and given != asked and started:
            notes.append(f"{flag} wins over {given}, which {started.launcher} was told")
    elif not gpus:
        has_deepspeed = options.deepspeed is not None or (
            started is not None and started.deepspeed is not None
        )
        precision = _cpu_precision(options, has_deepspeed, notes)
    elif all(gpu.has_bf16 for gpu in gpus):
        precision = "bf16"
        notes.append("mixed precision bf16: the GPUs have it")
    else:
        precision = "fp16"
        notes.append("mixed precision fp16: a GPU without bf16 (compute capability under 8.0) is among them")
    if precision == "fp16" and not gpus:
        raise LaunchError(
            "fp16 needs a GPU, and this run is on the CPU", hint="--mixed-precision no, or bf16 (slower)"
        )
    if precision == "bf16":
        without = [f"{gpu.name} ({gpu.model})" for gpu in gpus if not gpu.has_bf16]
        if without:
            raise LaunchError(
                f"bf16 is slow emulation on GPU {', '.join(without)}", hint="--mixed-precision fp16"
            )
    return precision


def _cpu_precision(options: Options, has_deepspeed: bool, notes: list[str]) -> MixedPrecision:
    if has_deepspeed:
        notes.append("mixed precision no: DeepSpeed on a CPU computes in float32")
        return "no"
    wants_speed = isinstance(options, TrainingOptions) and options.throughput == "auto"
    is_causal = getattr(options, "task", None) == "causal-lm"
    if not (wants_speed and is_causal):
        notes.append("mixed precision no: on a CPU bf16 is for language models, with --throughput auto")
        return "no"
    if not devices.cpu_has_bf16():
        notes.append("mixed precision no: bf16 is slower on a CPU without instructions for it")
        return "no"
    notes.append("mixed precision bf16: the CPU has instructions for it")
    return "bf16"


def _deepspeed_source(options: LaunchOptions, started: LaunchedWorld | None, notes: list[str]) -> str | None:
    """``zeroN``, an absolute path, or None."""
    source, given = options.deepspeed, started.deepspeed if started else None
    if source is None and given is not None and started is not None:
        source = given
        notes.append(f"deepspeed {given}: {started.launcher} was told so")
    elif source is not None and given not in (None, source) and started is not None and not started.is_ours:
        notes.append(f"--deepspeed {source} wins over {given}, which {started.launcher} was told")
    if source is None or source in deepspeed.STAGES:
        return source
    return str(Path(source).expanduser().absolute())


def _check_quantization(config: Options, stage: int | None, precision: str, notes: list[str]) -> str | None:
    """Check the quantization options; return the storage dtype that ZeRO-3 with 4 bits needs, else None."""
    if not isinstance(config, QuantizationOptions) or not (config.load_in_4bit or config.load_in_8bit):
        return None
    flag = "--load-in-4bit" if config.load_in_4bit else "--load-in-8bit"
    if not is_installed("bitsandbytes"):
        raise MissingDependencyError("bitsandbytes", purpose=flag)
    if stage != 3:
        return None
    if config.load_in_8bit:
        raise LaunchError(
            "--load-in-8bit does not work with ZeRO-3", hint="--load-in-4bit, or --deepspeed zero2"
        )
    storage = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}[precision]
    notes.append(
        f"4-bit weights are stored as {storage}: ZeRO-3 shards only what has the type of the computation"
    )
    return storage


def _threads_per_process(
    environ: Mapping[str, str], num_local_processes: int, started: LaunchedWorld | None, notes: list[str]
) -> int:
    given = environ.get("OMP_NUM_THREADS", "")
    # torchrun and accelerate launch write 1 where the user wrote nothing, so from them 1 is nobody's wish.
    is_wish = started is None or started.is_ours or given != "1"
    if given.isdecimal() and int(given) > 0 and is_wish:
        if started is None:
            notes.append(f"{given} threads a process: OMP_NUM_THREADS")
        return int(given)
    num_threads = max(1, devices.num_cpus() // num_local_processes)
    notes.append(
        f"{num_threads} threads a process: {devices.num_cpus()} CPU cores, {_processes(num_local_processes)}"
    )
    return num_threads
