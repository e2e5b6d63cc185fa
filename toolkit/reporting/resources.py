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

logger = logging.getLogger("toolkit.reporting")

NVML_INTERVAL_SECONDS = 1.0
# ru_maxrss is in kilobytes on Linux and in bytes on macOS.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def snapshot() -> dict[str, Any]:
    """What the process and its GPUs use now.

    Returns:
        ``rss_bytes`` and ``peak_rss_bytes`` of this process; ``cuda_peak_allocated_bytes`` and
        ``cuda_peak_reserved_bytes`` of torch's allocator, summed over the devices (None without CUDA);
        ``memory_bytes``: the peak that counts, of the allocator where there is CUDA, else of the process;
        ``gpus``: a dict for each visible GPU with ``index`` (NVML's), ``utilization_percent``,
        ``power_watts`` and ``memory_used_bytes`` (None where the driver does not tell), empty without a
        driver.
    """
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    allocated, reserved = _cuda_peaks()
    return {
        "rss_bytes": psutil.Process().memory_info().rss,
        "peak_rss_bytes": peak_rss_bytes,
        "cuda_peak_allocated_bytes": allocated,
        "cuda_peak_reserved_bytes": reserved,
        "memory_bytes": peak_rss_bytes if allocated is None else allocated,
        "gpus": gpus(),
    }


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


def gpu_names() -> list[dict[str, Any]]:
    """Index, name and total memory in bytes of each visible GPU."""
    return _nvml.describe()


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    return _nvml.driver_version()


def visible_devices(num_devices: int, uuids: Sequence[str], value: str | None) -> list[int]:
    """NVML's indices of the GPUs that CUDA_VISIBLE_DEVICES lets through.

    Args:
        num_devices: GPUs that NVML sees.
        uuids: their UUIDs (``GPU-...``), in NVML's order.
        value: the variable: numbers, UUIDs or beginnings of UUIDs; None (not set) means all. As CUDA does,
            everything from the first invalid entry on is ignored.
    """
    if value is None:
        return list(range(num_devices))
    chosen: list[int] = []
    for entry in (part.strip() for part in value.split(",")):
        if entry.isdigit() and int(entry) < num_devices:
            index = int(entry)
        else:
            matches = [
                i for i, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)
            ]
            if len(matches) != 1:
                break
            index = matches[0]
        if index not in chosen:
            chosen.append(index)
    return chosen


def _cuda_peaks() -> tuple[int | None, int | None]:
    torch = sys.modules.get("torch")
    # Asking before CUDA is initialised would initialise it.
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return None, None
    devices = range(torch.cuda.device_count())
    allocated = sum(torch.cuda.max_memory_allocated(device) for device in devices)
    return allocated, sum(torch.cuda.max_memory_reserved(device) for device in devices)


class _Nvml:
    """One connection to the driver, opened at first use and kept; without a driver everything is empty."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._library: Any = None
        self._handles: list[tuple[int, Any]] | None = None
        self._sampled: list[dict[str, Any]] = []
        self._sampled_at = -NVML_INTERVAL_SECONDS

    def sample(self) -> list[dict[str, Any]]:
        with self._lock:
            now = time.monotonic()
            if now - self._sampled_at >= NVML_INTERVAL_SECONDS:
                self._sampled_at = now
                self._sampled = [self._read(index, handle) for index, handle in self._opened()]
            return self._sampled

    def describe(self) -> list[dict[str, Any]]:
        with self._lock:
            described = []
            for index, handle in self._opened():
                name = self._ask("nvmlDeviceGetName", handle)
                memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
                total = None if memory is None else int(memory.total)
                described.append({"index": index, "name": name, "memory_bytes": total})
            return described

    def driver_version(self) -> str | None:
        with self._lock:
            self._opened()
            return None if self._library is None else self._ask("nvmlSystemGetDriverVersion")

    def _opened(self) -> list[tuple[int, Any]]:
        if self._handles is None:
            self._handles = []
            try:
                import pynvml

                pynvml.nvmlInit()
                self._library = pynvml
                handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
                uuids = [str(self._ask("nvmlDeviceGetUUID", handle)) for handle in handles]
                chosen = visible_devices(len(handles), uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))
                self._handles = [(index, handles[index]) for index in chosen]
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
