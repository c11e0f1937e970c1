"""Find the device and what it can compute in."""

import platform
from pathlib import Path

import torch

from gpt.configs.run_plan import MachineFacts
from gpt.errors import UserError


def find_device(wanted: str) -> str:
    """`auto` -> cuda, else mps, else cpu.

    Raises:
        UserError: the named device is not here.
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
        raise UserError(f"--device {wanted}: this machine has none; nearest: {available[0]}")
    return wanted


def machine_facts(device: str, world_size: int) -> MachineFacts:
    """Facts of this machine for the plan."""
    if device == "cuda":
        return MachineFacts(
            device,
            torch.cuda.get_device_name(),
            # Emulated bfloat16 (before Ampere) is slower than float32.
            torch.cuda.is_bf16_supported(including_emulation=False),
            world_size,
        )
    if device == "mps":
        return MachineFacts(device, platform.processor(), has_bfloat16=False, world_size=world_size)
    return MachineFacts(device, cpu_name(), cpu_has_bfloat16(), world_size)


def peak_memory(device: str) -> int | None:
    """Bytes: the most that torch had allocated on a GPU, or this process in memory; None where nobody tells."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage's ru_maxrss, which after fork and exec begins at the size of the program that started this one.
    kilobytes = _value_in("/proc/self/status", "VmHWM").removesuffix(" kB")
    return int(kilobytes) * 1024 if device == "cpu" and kilobytes else None


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; torch's own look-up is private, the kernel's is not."""
    flags = _cpuinfo("flags").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def cpu_name() -> str:
    """The CPU's name for people."""
    return f"{_cpuinfo('model name') or platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _cpuinfo(key: str) -> str:
    return _value_in("/proc/cpuinfo", key)


def _value_in(file: str, key: str) -> str:
    """A value of a file of Linux's /proc; empty elsewhere."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
