"""The machine: what this process is set up for on the CPU."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from helpers import ROOT
from support.machine import PRODUCT_CACHES

FAULTS = """
import resource
import torch
from support.machine import prepare_cpu

def count_faults():
    for _ in range(10):  # until the allocator's lists of small pieces are full
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = count_faults()
prepare_cpu()
print(before, count_faults())
"""
GROWTH = """
from pathlib import Path
import torch
from support.machine import prepare_cpu

def held():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6

prepare_cpu()
hidden = torch.ones(800, 256, dtype=torch.bfloat16)
weight = torch.ones(256, 256, dtype=torch.bfloat16)
before = held()
for rows in range(1, 801):
    torch.nn.functional.linear(hidden[:rows], weight)
print(held() - before)
"""


def printed(script, **environment):
    """The numbers that a process of its own prints: what is set holds as long as it lives."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(number) for number in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another")
def test_memory_of_freed_tensors_is_used_again_without_new_pages():
    before, after = printed(FAULTS)
    assert before > 100  # 80,000, or fewer large ones
    assert after < 0.1 * before


@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16"), reason="no compiled products in bfloat16"
)
def test_products_of_ever_new_shapes_fill_no_memory_unless_the_caches_are_set_larger():
    (bounded,) = printed(GROWTH)
    (grown,) = printed(GROWTH, **dict.fromkeys(PRODUCT_CACHES, "1024"))
    assert grown > 100  # MB
    assert bounded < 0.5 * grown
