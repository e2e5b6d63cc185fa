"""Memory, and the GPUs' utilisation, power and memory, cheap enough to ask at every step.

torch is looked at only when something else has imported it; NVML is asked at most once a second.
"""

import contextlib
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from toolkit.launch import devices

logger = logging.getLogger("toolkit.reporting")

NVML_INTERVAL_SECONDS = 1.0
# ru_maxrss is in kilobytes on Linux and in bytes on macOS.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def snapshot() -> dict[str, Any]:
    """What the process and its GPUs use now.

    Returns:
        ``memory_bytes``: the peak so far, reserved by torch's allocator summed over the devices where CUDA is
        in use, else resident of this process; ``gpus``: a dict for each visible GPU with ``index`` (NVML's),
        ``utilization_percent``, ``power_watts`` and ``memory_used_bytes`` (None where the driver does not
        tell, as for a MIG slice), empty without a driver.
    """
    peak_bytes = _cuda_peak_bytes()
    if peak_bytes is None:
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    return {"memory_bytes": peak_bytes, "gpus": gpus()}


def gpu_of_run(sampled: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """``snapshot()["gpus"]`` as one GPU: mean utilisation, summed power and memory; None for none."""
    if not sampled:
        return None
    combined: dict[str, float] = {}
    for key in ("utilization_percent", "power_watts", "memory_used_bytes"):
        values = [gpu[key] for gpu in sampled if gpu[key] is not None]
        if values:
            combined[key] = sum(values) / len(values) if key == "utilization_percent" else sum(values)
    return combined


def gpus() -> list[dict[str, Any]]:
    """The visible GPUs as NVML sees them; at most a second old. Empty where there is no driver."""
    return _nvml.sample()


def process_gpu_bytes() -> int | None:
    """GPU memory of this process as the driver sees it (allocator, context, libraries), summed over the visible GPUs;
    None where it does not tell."""
    return _nvml.process_bytes(os.getpid())


def gpu_names() -> list[dict[str, Any]]:
    """Index, name and total memory in bytes of each visible GPU."""
    return _nvml.describe()


def memory_limit_bytes() -> int:
    """Memory that there is for a run: of the GPUs that torch uses, else of the container or the machine."""
    torch = sys.modules.get("torch")
    if _cuda_peak_bytes() is not None and torch is not None:
        count = torch.cuda.device_count()
        used = [index for index in range(count) if torch.cuda.max_memory_reserved(index)]
        return sum(torch.cuda.get_device_properties(index).total_memory for index in used or range(count))
    limit_bytes = psutil.virtual_memory().total
    # cgroup v1 or none, or the word "max": the machine's memory alone counts.
    with (
        contextlib.suppress(OSError, ValueError),
        open("/sys/fs/cgroup/memory.max", encoding="ascii") as stream,
    ):
        limit_bytes = min(limit_bytes, int(stream.read()))
    return limit_bytes


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    return _nvml.driver_version()


def _cuda_peak_bytes() -> int | None:
    """Peak that torch's allocator has reserved on all devices; None where CUDA is not in use."""
    torch = sys.modules.get("torch")
    # Asking before CUDA is initialised would initialise it.
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return None
    return sum(torch.cuda.max_memory_reserved(index) for index in range(torch.cuda.device_count()))


class _Nvml:
    """One connection to the driver, opened at first use and kept; without a driver everything is empty."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._library: Any = None
        self._handles: list[tuple[devices.Gpu, Any]] | None = None
        self._sampled: list[dict[str, Any]] = []
        self._sampled_at = -NVML_INTERVAL_SECONDS

    def sample(self) -> list[dict[str, Any]]:
        with self._lock:
            now = time.monotonic()
            if now - self._sampled_at >= NVML_INTERVAL_SECONDS:
                self._sampled_at = now
                self._sampled = [self._read(gpu.index, handle) for gpu, handle in self._opened()]
            return self._sampled

    def describe(self) -> list[dict[str, Any]]:
        with self._lock:
            return [
                {"index": gpu.index, "name": gpu.model, "memory_bytes": gpu.memory_bytes}
                for gpu, _ in self._opened()
            ]

    def process_bytes(self, pid: int) -> int | None:
        with self._lock:
            found = [
                process.usedGpuMemory
                for _, handle in self._opened()
                for process in self._ask("nvmlDeviceGetComputeRunningProcesses", handle) or []
                if process.pid == pid and process.usedGpuMemory is not None
            ]
        return sum(found) if found else None

    def driver_version(self) -> str | None:
        with self._lock:
            self._opened()
            return None if self._library is None else self._ask("nvmlSystemGetDriverVersion")

    def _opened(self) -> list[tuple[devices.Gpu, Any]]:
        if self._handles is None:
            self._handles = []
            try:
                import pynvml

                pynvml.nvmlInit()
                self._library = pynvml
                self._handles = [
                    (gpu, pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid))
                    for gpu in devices.visible_gpus(devices.machine_gpus())
                ]
            # No driver, no package, no permission: there is nothing to measure, and that is not the run's
            # problem.
            except Exception as error:
                logger.debug("no GPU measurements: %s", error)
        return self._handles

    def _read(self, index: int, handle: Any) -> dict[str, Any]:
        utilization = self._ask("nvmlDeviceGetUtilizationRates", handle)
        power = self._ask("nvmlDeviceGetPowerUsage", handle)
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        return {
            "index": index,
            "utilization_percent": None if utilization is None else float(utilization.gpu),
            "power_watts": None if power is None else power / 1000,
            "memory_used_bytes": None if memory is None else int(memory.used),
        }

    def _ask(self, name: str, *arguments: Any) -> Any:
        with contextlib.suppress(self._library.NVMLError):
            return getattr(self._library, name)(*arguments)
        return None


_nvml = _Nvml()
