"""What a call costs: seconds and peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from robbench.errors import InputError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux


class Cost(NamedTuple):
    """What one call took."""

    seconds: float  # mean over the repetitions
    peak: float  # bytes; nan where the system does not tell


def cost(
    call: Callable[[], object], device: str = "cpu", repeats: int = 100, warmup: int = 1
) -> Cost:
    """Time and peak memory of a call: inference on a batch, or an epoch with repeats=1, warmup=0.

    Wang et al. 2019 (EnResNet), section 3.4: the mean of 100 runs. Peak memory is what torch held
    on a CUDA device, weights included; on a CPU what the call added to the process, whose weights
    and libraries were there before.
    """
    if repeats < 1 or warmup < 0:
        raise InputError(f"repeats is {repeats}, warmup {warmup}; write at least 1 and at least 0")
    for _ in range(warmup):
        call()
    before = _forget_peak(device)
    begin = _now(device)
    for _ in range(repeats):
        call()
    seconds = (_now(device) - begin) / repeats
    return Cost(seconds, _peak(device) - before)


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)  # a call returns before its kernels end
    return time.perf_counter()


def _forget_peak(device: str) -> float:
    """Bytes that are no part of the peak from here on."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0.0
    if os.access(CLEAR, os.W_OK):
        with contextlib.suppress(AttributeError):  # only glibc keeps what was freed
            ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")  # sets the high-water mark to the present use
    return _peak(device)


def _peak(device: str) -> float:
    if torch.device(device).type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if not os.access(CLEAR, os.W_OK):  # a mark that was not reset is that of some earlier work
        return float("nan")
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return float(fields["VmHWM"].split()[0]) * 1024
