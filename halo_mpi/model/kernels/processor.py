"""What this processor can do, as the compiler must know it."""

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm

from halo_mpi.model.kernels.arm import NEON, NEON_DOTPROD
from halo_mpi.model.kernels.isa import InstructionSet
from halo_mpi.model.kernels.x86 import AVX2, AVX512_VNNI

BY_MACHINE = {"x86_64": (AVX512_VNNI, AVX2), "aarch64": (NEON_DOTPROD, NEON)}  # the best first
LINUX_NAMES = {"asimddp": "dotprod"}  # of ARM features that LLVM 22 does not look for


@dataclass(frozen=True, slots=True)
class Processor:
    """`name` and `features` in LLVM's words; `isas`, the best first, is empty where the products cannot be compiled."""

    name: str
    features: str  # "+avx2,-avx512f"
    isas: tuple[InstructionSet, ...]


@cache
def this_processor() -> Processor:
    features = llvm.get_host_cpu_features()
    if platform.machine() == "aarch64":
        flags = linux_flags(Path("/proc/cpuinfo").read_text())
        features.update({feature: True for flag, feature in LINUX_NAMES.items() if flag in flags})
    isas = (isa for isa in BY_MACHINE.get(platform.machine(), ()) if all(features.get(feature) for feature in isa.features))
    return Processor(llvm.get_host_cpu_name(), features.flatten(), tuple(isas))


def linux_flags(cpuinfo: str) -> set[str]:
    """What all processors of an ARM machine can do, in the kernel's words."""
    lines = [line.partition(":") for line in cpuinfo.splitlines()]
    flags = [set(value.split()) for name, _, value in lines if name.strip() == "Features"]
    return set.intersection(*flags) if flags else set()
