"""What a device multiplies at best, its clock, and what a process held at most."""

import resource
import time

import torch

_H100_FLOP = 989e12


def now(device: torch.device) -> float:
    """Seconds by the clock once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_peak(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Flop a second of a square matrix product in this dtype: the best of some."""
    n, best = 8192 if device.type == "cuda" else 2048, 0.0
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    for _ in range(20):
        start = now(device)
        a @ b
        best = max(best, 2 * n**3 / (now(device) - start))
    h100 = device.type == "cuda" and "H100" in torch.cuda.get_device_name(device)
    return max(best, _H100_FLOP) if h100 and dtype is torch.bfloat16 else best


def held_mb() -> int:
    """MB of memory that this process held at most until now, in 10^6 bytes."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
