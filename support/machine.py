"""The machine: what device and dtype a run computes with, its speed, the memory that was used."""

import ctypes
import os
import platform
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import torch
import transformers
from torch.utils.benchmark import Timer

from support.errors import InputError, first_line
from support.four_bit import count_weights
from support.processes import WORLD

resource = import_module("resource") if find_spec("resource") else None  # Windows has none
# how many compiled matrix products PyTorch and oneDNN keep at most; a row needs about 150
PRODUCT_CACHES = {"LRU_CACHE_CAPACITY": "256", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}
# glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD: free memory at the heap's end, and blocks, that the
# system has back if they are larger
HEAP_LIMITS = (-1, -3)


def resolve_machine(config):
    """The config with device and dtype decided: bfloat16 only where it is the faster one.

    For the CPU this process is set up too (prepare_cpu).

    raises   InputError for a device that is not there or a package that is not installed
    """
    _require_packages(config)
    device = config.device
    if device == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    advice = "Give cpu, cuda or mps, or auto for the one that is there"
    if device.startswith("cpu:"):  # PyTorch would take it for cpu
        raise InputError(f"device {device}: the CPU has no number. {advice}")
    try:
        torch.zeros(1, device=device).item()  # meta has no numbers to give
        fast = _multiplies_bfloat16_faster(device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"device {device}: {first_line(error)}. {advice}") from error
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if fast else "float32"
    if device == "cpu":
        prepare_cpu()
    return replace(config, device=device, dtype=dtype)


def prepare_cpu():
    """Set this process up to compute on the CPU, before its first matrix product.

    In bfloat16 each product of a new shape is compiled, and takes 0.6 MB: fewer are kept, for most
    rows have shapes of their own. Freed memory is kept for the next tensors, up to 2 GB of it where
    the C library is glibc: else each step has gigabytes of pages zeroed and mapped anew.
    """
    for cache, capacity in PRODUCT_CACHES.items():
        os.environ.setdefault(cache, capacity)
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        for limit in HEAP_LIMITS:
            ctypes.CDLL(None).mallopt(limit, 2**31 - 1)


def _require_packages(config):
    """InputError for an optional package that the config needs and that is not installed."""
    needed = []
    if config.lora_r:
        needed.append("peft")
    if config.load_in_4bit:
        needed.append("bitsandbytes")
    if config.report_to != "none":
        needed.append(config.report_to)
    missing = " ".join(package for package in needed if not find_spec(package))
    if missing:
        raise InputError(f"this config needs {missing}: pip install {missing}")


def _multiplies_bfloat16_faster(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = torch.cpu.get_capabilities()
    return device == "cpu" and bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))


def numerics(config):
    """What a log-probability's last digits depend on, beside the weights and the row it is in."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": config.device,
        "dtype": config.dtype,
        "processes": WORLD,
        "threads": torch.get_num_threads(),
        "cpu": torch.cpu.get_capabilities().get("cpu_name"),
        "gpu": gpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def matmul_peak(config):
    """Floating point operations a second of matrix products in the compute dtype, measured."""
    size = 1024 if config.device == "cpu" else 8192  # enough to keep it busy
    a = torch.randn(size, size, device=config.device, dtype=getattr(torch, config.dtype))
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return WORLD * 2 * size**3 / timer.timeit(20).median


def operations_a_token(model, weights):
    """Floating point operations of a training step for each token.

    Two a weight in the forward pass, two in the backward pass, and two more if it is trained: as
    if each token met all experts of a mixture, and the LM head.
    """
    trained = sum(weight.numel() for weight in weights.values())
    return 2 * (2 * count_weights(model) + trained)


def peak_memory(device):
    """Bytes of a GPU's memory, or for other devices of main memory, that this process held at most.

    returns  int; None where the system does not tell
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return None
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held
