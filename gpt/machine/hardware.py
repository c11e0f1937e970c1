"""The device, its dtypes and its memory."""

import platform
from pathlib import Path

import torch

from gpt.configs.run_plan import MachineFacts
from gpt.errors import UserError
from gpt.machine.resources import find_free_host_memory
from gpt.utils.helper import plural


def find_device(wanted: str) -> str:
    """Return the device to train on: for `auto` the first of cuda, mps and cpu that this machine has.

    Raises:
        UserError: this machine does not have the device.
    """
    available = [
        name
        for name, present in (
            ("cuda", torch.cuda.is_available()),
            ("mps", torch.backends.mps.is_available()),
            ("cpu", True),
        )
        if present
    ]
    if wanted == "auto":
        return available[0]
    if wanted not in available:
        raise UserError(f"--device {wanted} is not available on this machine; nearest: {available[0]}")
    return wanted


def detect_machine(device: str, world_size: int) -> MachineFacts:
    """Return the facts of this machine that a plan depends on."""
    if device == "cuda":
        return MachineFacts(
            device,
            torch.cuda.get_device_name(),
            # Emulated bfloat16 (before Ampere) is slower than float32, so it does not count.
            torch.cuda.is_bf16_supported(including_emulation=False),
            world_size,
            gpu_count=torch.cuda.device_count(),
        )
    if device == "mps":
        return MachineFacts(device, platform.processor(), has_bfloat16=False, world_size=world_size)
    return MachineFacts(device, cpu_name(), cpu_has_bfloat16(), world_size)


def peak_memory(device: str) -> int | None:
    """Return the peak bytes that torch allocated on a GPU, or that this process had in memory; None if unknown."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage's ru_maxrss, which after fork and exec starts at the size of the parent process.
    kilobytes = _read_proc_value("/proc/self/status", "VmHWM").removesuffix(" kB")
    return int(kilobytes) * 1024 if device == "cpu" and kilobytes else None


def reset_peak_memory(device: str) -> None:
    """Start to measure the peak of a GPU's memory anew: trials of what fits use as much as there is."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def find_free_memory(device: str) -> int | None:
    """Return the bytes that are free on a GPU, or on the host for all processes together; None if unknown."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return find_free_host_memory()


def cpu_has_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 in hardware.

    Read from the kernel, because torch's own function for it is private.
    """
    flags = _cpuinfo("flags").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def cpu_name() -> str:
    """Return the CPU's name and its number of threads, for people."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{name}, {plural(torch.get_num_threads(), 'thread')}"


def _cpuinfo(key: str) -> str:
    return _read_proc_value("/proc/cpuinfo", key)


def _read_proc_value(file: str, key: str) -> str:
    """Return a value in a file of Linux's /proc; an empty string on other systems."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
