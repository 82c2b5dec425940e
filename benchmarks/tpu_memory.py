"""Memory of a training step on TPU chips, compiled ahead of time on any machine: block and full beside the baseline.

    pip install -e ".[tpu]"
    python benchmarks/tpu_memory.py                        # width 512, 16 layers, N=8, 1024 tokens, float32
    python benchmarks/tpu_memory.py --width=2048 --layers=32 --tokens=8192 --dtype=bfloat16
    python benchmarks/tpu_memory.py --scoped_vmem_kib=129024      # with nearly no array in the chip's own memory

No TPU is needed: libtpu compiles for the topologies named and reports the memory of a device. The baseline keeps the
input of every block and recomputes the rest (`--remat=full`), as the other arms do; `+ [B,T,D]` is what an arm needs
beyond it, in activations of the model's dtype, beside the bound of N + 4. Temporary bytes are what the compiler sets
aside, with the holes that its packing leaves; alive is what is in use of them at the peak. Arrays that it puts into the
chip's own memory are in neither. What they are, XLA writes down by itself: `XLA_FLAGS="--xla_dump_to=DIR
--xla_dump_hlo_as_text"`, files `*live-range.txt` and `*buffer-assignment.txt`.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import step
from absl import flags
from jax.experimental import topologies

from attnres_jax.cli import launch
from attnres_jax.errors import ConfigError
from attnres_jax.parallel import one_device_mesh, use_mesh

TOPOLOGIES = flags.DEFINE_list("topologies", ["v5p:2x2x1", "v6e:2x2"], "TPU slices; one device of each is used.")
SCOPED_VMEM = flags.DEFINE_integer(
    "scoped_vmem_kib", None, "KiB of the chip's own memory that are kept free of arrays."
)


def main(arguments: list[str], overrides: list[str]) -> None:
    if arguments or overrides:
        raise ConfigError(f"unexpected argument {(arguments or overrides)[0]!r}")
    if not flags.FLAGS["remat"].present:
        flags.FLAGS.remat = "full"
    arms = step.ARMS.value if flags.FLAGS["arms"].present else ["residual", "block", "full"]
    blocks, *more = step.block_counts()
    if more:
        raise ConfigError(f"--blocks={','.join(step.BLOCKS.value)}: give one number here")
    per_block, figures = step.layers_of_a_block(blocks), []
    options = {"xla_tpu_scoped_vmem_limit_kib": str(SCOPED_VMEM.value)} if SCOPED_VMEM.value else {}
    activation = step.TOKENS.value * step.WIDTH.value * jnp.dtype(step.DTYPE.value).itemsize
    print(
        f"width {step.WIDTH.value}, {step.LAYERS.value} layers, N={blocks}, {step.TOKENS.value} tokens, "
        f"{step.DTYPE.value}, remat {step.REMAT.value}, jax {jax.__version__}"
    )
    print(f"{'device':12}{'rule':10}{'temp bytes':>15}{'+ [B,T,D]':>11}{'alive':>15}{'+ [B,T,D]':>11}{'bound':>7}")
    for name in TOPOLOGIES.value:
        try:
            device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
        except Exception as error:  # whatever libtpu says, or that it is not there
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"no TPU compiler for {name!r} (pip install -e '.[tpu]'): {reason}") from None
        base = None
        for arm in arms:
            with use_mesh(one_device_mesh(device)):  # or the attention would be this machine's
                lowered = step.lower(arm, step.LAYERS.value, 2 * per_block, device)
            memory = lowered.compile(compiler_options=options).memory_analysis()
            sizes = memory.temp_size_in_bytes, memory.peak_memory_in_bytes - memory.argument_size_in_bytes
            base = base or sizes
            extra = [(size - first) / activation for size, first in zip(sizes, base, strict=True)]
            columns = "".join(f"{size:15,d}{more:11.1f}" for size, more in zip(sizes, extra, strict=True))
            print(f"{name:12}{arm:10}{columns}{blocks + 4:7d}", flush=True)
            for kind, size, more in zip(("temp", "alive"), sizes, extra, strict=True):
                figures += [
                    {"name": f"{name}/{arm}/{kind}_bytes", "value": size, "unit": "bytes"},
                    {"name": f"{name}/{arm}/{kind}_extra_activations", "value": more, "unit": "[B, T, D]"},
                ]
    if step.JSON.value:
        Path(step.JSON.value).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    launch(main)
