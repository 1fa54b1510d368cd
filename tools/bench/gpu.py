"""What only a GPU tells: tokens per second, peak memory, share of the peak rate (MFU).

Written for real, but never run by us: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense bf16 peak in FLOP/s, by a part of the device's name (NVIDIA's data sheets).
PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}


def gpu_columns(run: Callable[[], object], seconds: float, tokens: int) -> dict[str, float | str]:
    """Columns of one variant on the current device.

    Args:
        run: One step of it.
        seconds: That it takes.
        tokens: Patches and words that it reads.
    """
    torch.cuda.reset_peak_memory_stats()
    run()
    memory = torch.cuda.max_memory_allocated() / 2**30
    with FlopCounterMode(display=False) as counter:
        run()
    name = torch.cuda.get_device_name()
    peak = next((rate for part, rate in PEAKS.items() if part in name), None)
    used = counter.get_total_flops() / seconds
    return {
        "tokens/s": tokens / seconds,
        "peak GiB": memory,
        "TFLOP/s": used / 1e12,
        "MFU": "" if peak is None else used / peak,
    }
