"""Measure registers, spills and memory of the selective scan's Mosaic kernels, compiled for Hopper without a GPU.

    pip install jax-cuda13-plugin jax-cuda13-pjrt      # the same version as jax; ptxas must be on the PATH
    python -m kernels.benchmarks.compile_selective_scan

The table shows XLA's temporary memory next to the value of its formula in kernels/README.md. Exit codes: 1 if a kernel
spills registers to memory or cannot be compiled; 2 if the plugin is not installed.
"""

import functools
import importlib.util
import itertools
import os
import re
import subprocess
import sys

# Set before jax is imported, so that the CUDA plugin does not search for a GPU and ptxas prints its report.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from iumad_kernels.selective_scan import pallas_mosaic
from iumad_kernels.selective_scan.arguments import Options, split_arguments
from iumad_kernels.selective_scan.tiling import Tiling
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.benchmarks import command_line

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
"""
# (batch, length, channels, states, groups) of ES2D at patch sizes 4, 8 and 16, other numbers of states, and segments.
SHAPES = [(24, 784, 2048, 16, 4), (24, 196, 2048, 16, 4), (24, 49, 2048, 16, 4)]
SHAPES += [(32, 1024, 512, states, 1) for states in (1, 8, 32, 64, 128)] + [(1, 4096, 512, 16, 1)]


def compile_gradient(shape: tuple[int, ...], dtype: jnp.dtype) -> None:
    """Compile the forward and the backward kernel. ptxas writes its report to the standard output of the process."""
    batch, length, channels, states, groups = shape
    topology = topologies.get_topology_desc(topology_name="h200", platform="cuda", topology="1x1x1", target_config=H200)
    sharding = NamedSharding(Mesh(np.array(topology.devices[:1]), ("devices",)), PartitionSpec())
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    sequence = struct((batch, length, channels), dtype)
    projection = struct((batch, length, groups, states), dtype)
    parameter = struct((channels,), jnp.float32)
    A = struct((channels, states), jnp.float32)
    args = {"x": sequence, "delta": sequence, "A": A, "B": projection, "C": projection}
    args |= {"D": parameter, "z": sequence, "delta_bias": parameter}

    def results(args: dict[str, jax.Array], dy: jax.Array) -> tuple:
        y, vjp = jax.vjp(lambda args: pallas_mosaic.selective_scan(*split_arguments(args), Options())[0], args)
        return y, vjp(dy)

    compiled = jax.jit(results).trace(args, sequence).lower(lowering_platforms=("cuda",)).compile()
    arrays = compiled.memory_analysis().temp_size_in_bytes / (4 * batch * length * channels)
    tiling = Tiling(length, channels, groups, states)
    formula = 2 + tiling.padded_states * (1 / 8 + 2 / tiling.width)
    print(f"memory: {arrays:.2f} ({formula:.2f})")


def main() -> int:
    """Run the command and return its exit code.

    Each compilation runs in a separate process, because the report of ptxas appears when the process ends.
    """
    if len(sys.argv) == 3:
        compile_gradient(tuple(map(int, sys.argv[1].split(","))), jnp.dtype(sys.argv[2]))
        return 0
    command_line.parser(str(__doc__)).parse_args()
    plugins = [f"jax_cuda{version}_plugin" for version in (12, 13)]
    if not any(map(importlib.util.find_spec, plugins)):
        print(
            "the CUDA plugin is not installed; run pip install jax-cuda13-plugin jax-cuda13-pjrt (the version of jax).",
            file=sys.stderr,
        )
        return 2
    print(f"jax {jax.__version__}, sm_90a\n")
    print("| batch, length, channels, states, groups | dtype | registers | spilled bytes | float32 arrays (formula) |")
    print("|---|---|---|---|---|")
    spilled = 0
    for shape, dtype in itertools.product(SHAPES, ("float32", "bfloat16")):
        command = [sys.executable, __file__, ",".join(map(str, shape)), dtype]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        output = process.stdout + process.stderr
        registers, memory = re.findall(r"Used (\d+) registers", output), re.findall(r"memory: (.*)", output)
        if process.returncode or len(registers) < 2:
            print(f"compilation of {shape} in {dtype} failed:\n{output[-2000:]}")
            return 1
        bytes_spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", output)]
        spilled += sum(bytes_spilled)
        cells = [", ".join(map(str, shape)), dtype, ", ".join(registers), str(sum(bytes_spilled)), *memory]
        print(f"| {' | '.join(cells)} |", flush=True)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
