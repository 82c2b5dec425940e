"""TPU chips: what is published of them, and slices of them that need not be there."""

import dataclasses
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from attnres_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip; its peak of operations is in `training/flops.py`.

    Attributes:
      hbm_bytes: memory.
      hbm_rate: bytes a second between it and the cores.
      ici_rate: bytes a second that it sends to its neighbours, all links together.
    """

    hbm_bytes: float
    hbm_rate: float
    ici_rate: float


# https://docs.cloud.google.com/tpu/docs/v5p, /v5e and /v6e. The interconnect is given for both directions together
# (1200, 400 and 800 GB/s): half of that is sent.
CHIPS = {
    "TPU v5": Chip(95e9, 2765e9, 600e9),
    "TPU v5 lite": Chip(16e9, 819e9, 200e9),
    "TPU v6 lite": Chip(32e9, 1638e9, 400e9),
}
"""By JAX's `device_kind`: v5p, v5e, v6e."""

# What libtpu would look for on a machine that has TPUs; without them it warns of each.
_NO_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is held that two processes could want
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "4",
    "TPU_MIN_LOG_LEVEL": "4",
}


def slice_devices(name: str) -> tuple[list[Any], Chip]:
    """The devices of a TPU slice to compile for, such as `v5p:4x4x4`, and their chip. No TPU is needed, and none used.

    Must come before the first computation of the process, which then has its CPU alone.

    Raises:
      ConfigError: if there is no such slice, no figures of its chip, or no libtpu.
    """
    if not re.fullmatch(r"\w+:\d+(x\d+){1,2}", name):
        raise ConfigError(f"--topology={name} is not a TPU slice, which is written like v5p:4x4x4 or v6e:4x4")
    jax.config.update("jax_platforms", "cpu")
    for key, value in _NO_TPU.items():
        os.environ.setdefault(key, value)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # of libtpu, or that it is not there
        reason = " ".join(str(error).split())
        if "not installed" in reason:
            raise ConfigError(
                f"--topology={name}: there is no TPU compiler here; pip install 'attnres_jax[tpu]' brings it"
            ) from None
        raise ConfigError(
            f"--topology={name}: {reason[:200]}; slices are written like v5p:4x4x4, v5e:4x4 or v6e:4x4"
        ) from None
    chip = CHIPS.get(devices[0].device_kind)
    if chip is None:
        raise ConfigError(
            f"--topology={name}: the rates of {devices[0].device_kind} are not known; v5p, v5e and v6e are"
        )
    return list(devices), chip
