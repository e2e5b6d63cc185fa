"""The NVIDIA GPUs of this machine, without torch.

NVML (nvidia-ml-py) is asked, so nothing here starts a CUDA context. GPUs are numbered as nvidia-smi does
(order of the PCI bus); the launcher sets ``CUDA_DEVICE_ORDER=PCI_BUS_ID``, so that CUDA counts in the same
way.
"""

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pynvml

from toolkit.errors import LaunchError

BF16_COMPUTE_CAPABILITY = (8, 0)
"""First compute capability with bf16 tensor cores (Ampere)."""


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: what CUDA_VISIBLE_DEVICES calls it: its index, or the UUID of a MIG slice.
        index: its number in the driver; of a MIG slice that of the GPU of which it is a part.
        uuid: its UUID, ``GPU-…`` or ``MIG-…``.
        model: product name, e.g. ``NVIDIA H200``.
        compute_capability: (major, minor).
        memory_bytes: total memory.
    """

    name: str
    index: int
    uuid: str
    model: str
    compute_capability: tuple[int, int]
    memory_bytes: int

    @property
    def is_slice(self) -> bool:
        """Whether it is a MIG slice. CUDA shows a process one slice at most."""
        return self.name == self.uuid

    @property
    def has_bf16(self) -> bool:
        return self.compute_capability >= BF16_COMPUTE_CAPABILITY


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _mig_slices(handle: object, parent: Gpu) -> list[Gpu]:
    """MIG slices of a GPU; empty where MIG is off or unknown."""
    try:
        current_mode, _ = pynvml.nvmlDeviceGetMigMode(handle)
        if current_mode != pynvml.NVML_DEVICE_MIG_ENABLE:
            return []
        max_num_slices = pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except pynvml.NVMLError:
        return []
    slices = []
    for index in range(max_num_slices):
        try:
            slice_handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except pynvml.NVMLError:
            continue
        uuid = _text(pynvml.nvmlDeviceGetUUID(slice_handle))
        memory_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(slice_handle).total)
        slices.append(
            replace(parent, name=uuid, uuid=uuid, model=f"{parent.model} (MIG)", memory_bytes=memory_bytes)
        )
    return slices


def machine_gpus() -> list[Gpu]:
    """All GPUs that NVML lists, MIG slices in place of a GPU that is cut into them; empty without a
    driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        gpus: list[Gpu] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            gpu = Gpu(
                name=str(index),
                index=index,
                uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
                model=_text(pynvml.nvmlDeviceGetName(handle)),
                compute_capability=(int(major), int(minor)),
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            )
            gpus.extend(_mig_slices(handle, gpu) or [gpu])
        return gpus
    except pynvml.NVMLError as error:
        raise LaunchError(
            f"the NVIDIA driver does not answer: {error}",
            hint="look at nvidia-smi; --cpu trains without a GPU",
        ) from error
    finally:
        pynvml.nvmlShutdown()


def visible_gpus(gpus: Sequence[Gpu], environ: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` leaves, in its order; all of them where it is not set.

    As in CUDA, the list ends at the first entry that names no GPU (``-1`` and the empty string hide all), and
    the number of a GPU that is cut into MIG slices is its first slice.
    """
    setting = environ.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        return list(gpus)
    visible: list[Gpu] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdecimal():
            matches = [gpu for gpu in gpus if gpu.index == int(entry)][:1]
        else:
            is_uuid = entry.startswith(("GPU-", "MIG-"))
            matches = [gpu for gpu in gpus if is_uuid and gpu.uuid.startswith(entry)]
        if len(matches) != 1:
            break
        if matches[0] not in visible:
            visible.append(matches[0])
    return visible


def asked_gpus(
    text: str, on_machine: Sequence[Gpu], visible: Sequence[Gpu], environ: Mapping[str, str]
) -> list[Gpu]:
    """The GPUs that ``--gpu`` names, by their number on the machine; a MIG slice counts as a GPU.

    Raises:
        LaunchError: a number that no GPU has, or a GPU that is not visible.
    """
    names = [part.strip() for part in text.split(",")]
    known = {str(number): gpu for number, gpu in enumerate(on_machine)}
    for name in names:
        if name not in known:
            have = "it has only GPU " if len(known) == 1 else "it has the GPUs "
            raise LaunchError(
                f"--gpu {text}: there is no GPU {name!r} in this machine; {have}{', '.join(known)}",
                hint="write --gpu 0, or several as --gpu 0,1; nvidia-smi -L lists them",
            )
        if known[name] not in visible:
            raise LaunchError(
                f"--gpu {text}: CUDA_VISIBLE_DEVICES={environ['CUDA_VISIBLE_DEVICES']} hides GPU {name}",
                hint="unset CUDA_VISIBLE_DEVICES, or choose among the GPUs that it leaves",
            )
    return [known[name] for name in names]


def torch_build() -> str:
    """Version of the installed torch with its build, e.g. ``2.13.0+cpu``; torch is not imported."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise LaunchError(
            "torch is not installed", hint="`make setup` installs the build that fits this machine"
        ) from None


def torch_is_cpu_only(build: str) -> bool:
    """Whether a torch build says of itself that it cannot use a GPU."""
    return build.partition("+")[2].startswith("cpu")


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices by itself (AVX512-BF16 or AMX), which is about twice as fast as float32;
    elsewhere it is slower. As Linux says; elsewhere no."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            flags = next((line for line in stream if line.startswith("flags")), "")
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.split())


def num_cpus() -> int:
    """CPU cores that this process may use: its affinity mask, and no more than its container's quota."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as stream:
            quota, period = stream.read().split()
        if quota != "max":
            num_cores = min(num_cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2: the mask alone counts
    return max(1, num_cores)
