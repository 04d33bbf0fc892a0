"""Chips, as their data sheets describe them, and the targets that kernels are compiled for."""

import dataclasses
from collections.abc import Mapping
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Chip:
    """Numbers of a chip's data sheet.

    Attributes:
      name: the vendor's spelling.
      source: documents with the numbers.
      kind: gpu or tpu.
      cores: streaming multiprocessors, or vector units.
      clock_ghz: the boost clock.
      flops_per_clock: float32 operations per core and clock; a fused multiply-add, where the chip has one, counts as two.
      specials_per_clock: exp2, 1 / x, 1 / sqrt(x) and the like per core and clock; None where the vendor publishes no number.
      bandwidth: of the memory, bytes/s.
      memory, l2: bytes.
      capability: CUDA compute capability.
      threads: maximum number of resident threads per core.
      shared: bytes of shared memory per core.
      shared_optin: maximum bytes of shared memory per block.
      matrix: peak operations per second of dense matrix products, by the type of their operands, at jax's default precision:
        float32 in TF32 on a GPU, and in one pass of bfloat16 on a TPU.
      link: bytes/s that a chip sends to its neighbours, in one direction, over all of its links.
      linked: number of chips that these links reach.
      network: bytes/s per chip, in one direction, beyond those; of one 400 Gbit/s adapter per GPU, or a TPU pod's own links.
    """

    name: str
    source: str
    kind: Literal["gpu", "tpu"]
    cores: int
    clock_ghz: float
    flops_per_clock: int
    specials_per_clock: int | None
    bandwidth: float
    memory: int
    l2: int = 0
    capability: tuple[int, int] = (0, 0)
    threads: int = 0
    shared: int = 0
    shared_optin: int = 0
    matrix: Mapping[str, float] = dataclasses.field(default_factory=dict)
    link: float = 0.0
    linked: int = 1
    network: float = 5e10

    @property
    def flops(self) -> float:
        """Peak float32 operations per second."""
        return self.cores * self.flops_per_clock * self.clock_ghz * 1e9

    @property
    def specials(self) -> float | None:
        """Peak special functions per second, or None."""
        return self.specials_per_clock and self.cores * self.specials_per_clock * self.clock_ghz * 1e9


_GUIDE = "CUDA C++ Programming Guide (special functions per clock, limits of a multiprocessor)"

CHIPS = {
    "a100": Chip(
        "NVIDIA A100 SXM 80 GB",
        f"NVIDIA A100 data sheet and A100 architecture whitepaper; {_GUIDE}",
        *("gpu", 108, 1.41, 128, 16, 2.039e12, 80 * 2**30, 40 * 2**20, (8, 0), 2048, 164 * 2**10, 163 * 2**10),
        *({"float32": 1.56e14, "bfloat16": 3.12e14}, 3e11, 8),
    ),
    "rtx4090": Chip(
        "NVIDIA GeForce RTX 4090",
        f"NVIDIA Ada GPU architecture whitepaper; {_GUIDE}",
        *("gpu", 128, 2.52, 256, 16, 1.008e12, 24 * 2**30, 72 * 2**20, (8, 9), 1536, 100 * 2**10, 99 * 2**10),
        *({"float32": 8.26e13, "bfloat16": 1.652e14}, 3.2e10, 8),
    ),
    "h100": Chip(
        "NVIDIA H100 SXM 80 GB",
        f"NVIDIA H100 data sheet and H100 architecture whitepaper; {_GUIDE}",
        *("gpu", 132, 1.98, 256, 16, 3.35e12, 80 * 2**30, 50 * 2**20, (9, 0), 2048, 228 * 2**10, 227 * 2**10),
        *({"float32": 4.947e14, "bfloat16": 9.894e14}, 4.5e11, 8),
    ),
    "v5e": Chip(
        "Google TPU v5e",
        # 197 TFLOP/s = 4 matrix units of 128 x 128 multiply-adds at 1.5 GHz; the vector unit: 8 x 128 lanes of 4 ALUs.
        "Google Cloud TPU v5e documentation (memory, and the clock from 197 TFLOP/s); How to Scale Your Model (vector unit)",
        *("tpu", 1, 1.5, 4096, None, 8.19e11, 16 * 2**30),
        matrix={"float32": 1.97e14, "bfloat16": 1.97e14},
        link=2e11,  # the documentation's 1,600 Gbit/s
        linked=256,
    ),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A mesh of chips with one cloud each.

    Attributes:
      chip: key of CHIPS.
      devices: number of chips.
      topology: its name in `jax.experimental.topologies`.
    """

    chip: str
    devices: int
    topology: str


TARGETS = {
    "a100": Target("a100", 1, "1x1x1"),
    "rtx4090": Target("rtx4090", 1, "1x1x1"),
    "h100": Target("h100", 1, "1x1x1"),
    "8xh100": Target("h100", 8, "1x1x8"),
    "v5e:2x4": Target("v5e", 8, "v5e:2x4"),
}


def target_config(chip: Chip) -> str:
    """The text proto (stream_executor.GpuTargetConfigProto) that describes a GPU to XLA's compiler.

    The limits that `Chip` lacks are those of every GPU in CHIPS (CUDA C++ Programming Guide, compute capabilities 8.0 to 9.0).
    """
    major, minor = chip.capability
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_block_optin": chip.shared_optin,
        "shared_memory_per_core": chip.shared,
        "threads_per_core_limit": chip.threads,
        "core_count": chip.cores,
        "fpus_per_core": chip.flops_per_clock // 2,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "memory_bandwidth": round(chip.bandwidth),
        "l2_cache_size": chip.l2,
        "clock_rate_ghz": chip.clock_ghz,
        "device_memory_size": chip.memory,
        "device_address_bits": 64,
    }
    # CUDA 12's compiler, a driver that runs its output, and a cuDNN of the same age.
    return f"""
gpu_device_info {{
  {" ".join(f"{name}: {value}" for name, value in fields.items())}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  name: "{chip.name}" driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{chip.name}"
"""
