"""The reader of collectives: programs of known traffic, compiled for eight devices, and the notations of TPUs."""

import json
import os
import subprocess
import sys

import pytest

from attnres_jax.parallel.collectives import Traffic, parse, traffic, type_bytes

MESH = {"data": 2, "fsdp": 4}
PROGRAMS = """
import json, sys
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P
from attnres_jax.parallel.collectives import traffic

mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
ring = [(i, (i + 1) % 4) for i in range(4)]

def gather_in_scan(x):
    return lax.scan(lambda h, _: (h * jnp.sum(lax.all_gather(h, "fsdp", tiled=True)), None), x, length=5)[0]

def nested(x):
    inner = lambda h, _: (jnp.sin(lax.psum(h, "data")), None)
    outer = lambda h, _: (lax.scan(inner, h, length=3)[0] + 1, None)
    return lax.scan(outer, x, length=7)[0]

programs = {
    "psum": lambda x: lax.psum(x, "fsdp"),
    "psum of both": lambda x: lax.psum(x, ("data", "fsdp")),
    "gather in a scan": gather_in_scan,
    "nested scans": nested,
    "reduce-scatter": lambda x: lax.psum_scatter(x, "data", tiled=True),
    "permute": lambda x: lax.ppermute(x, "fsdp", ring),
    "all-to-all": lambda x: lax.all_to_all(x, "fsdp", 0, 0, tiled=True),
    "nothing": lambda x: x + 1,
}
found = {}
for name, program in programs.items():
    spec = P(("data", "fsdp"))
    run = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    text = run.lower(jax.ShapeDtypeStruct((8 * 16,), jnp.float32)).compile().as_text()
    rows, unknown = traffic(text, mesh.shape)
    found[name] = [[row.kind, row.axes, row.times, row.sent_bytes] for row in rows], unknown
json.dump(found, sys.stdout)
"""
KNOWN = {  # a device has 16 float32 numbers, 64 bytes
    "psum": [["all-reduce", ["fsdp"], 1, 2 * 64 * 3 // 4]],
    "psum of both": [["all-reduce", ["data", "fsdp"], 1, 2 * 64 * 7 // 8]],
    "gather in a scan": [["all-gather", ["fsdp"], 5, 5 * 3 * 64]],
    "nested scans": [["all-reduce", ["data"], 21, 21 * 64]],
    "reduce-scatter": [["reduce-scatter", ["data"], 1, 32]],
    "permute": [["collective-permute", ["fsdp"], 1, 64]],
    "all-to-all": [["all-to-all", ["fsdp"], 1, 48]],
    "nothing": [],
}

LOOP = """HloModule jit_step, is_scheduled=true

%cond (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(6)
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%all-reduce-scatter.1 (x: f32[1024]) -> f32[256] {
  %x = f32[1024]{0:T(1024)} parameter(0)
  %sum = f32[1024]{0:T(1024)} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %own = f32[256]{0:T(256)} dynamic-slice(%sum, %at), dynamic_slice_sizes={256}
}

%gathering (y: bf16[4,8]) -> bf16[8,8] {
  %y = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all = bf16[8,8]{1,0} all-gather(%y), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %h = f32[1024]{0} get-tuple-element(%q), index=1
  %named = f32[1024]{0} all-reduce(%h), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%add
  %kept = f32[256]{0} fusion(%h), kind=kCustom, calls=%all-reduce-scatter.1
  %begun = ((bf16[4,8]{1,0}), bf16[8,8]{1,0}, u32[]{:S(2)}) async-start(%w), calls=%gathering
  %ended = bf16[8,8]{1,0} async-done(%begun), calls=%gathering
  %sent = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%v), source_target_pairs={{0,1},{3,4}}
  %v = bf16[4,8]{1,0} copy(%ended)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body
}
"""


def test_programs_of_known_traffic():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", PROGRAMS], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert {name: rows for name, (rows, _) in found.items()} == KNOWN
    assert not any(unknown for _, unknown in found.values())


def test_a_tpu_program():
    rows, unknown = traffic(LOOP, MESH)
    assert not unknown
    assert sorted(rows, key=lambda row: row.kind) == [
        Traffic("all-gather", ("data",), 6, 6 * 64),
        Traffic("all-reduce", ("data",), 6, 6 * 2 * 4096 // 2),
        Traffic("collective-permute", ("data", "fsdp"), 6, 6 * 64),
        Traffic("reduce-scatter", ("fsdp",), 6, 6 * 4096 * 3 // 4),
    ]


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    rows, unknown = traffic(LOOP.replace("constant(6)", "parameter(1)"), MESH)
    assert unknown == 1 and {row.times for row in rows} == {1}
    known = LOOP.replace("constant(6)", "parameter(1)").replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}'
    )
    rows, unknown = traffic(known, MESH)
    assert unknown == 0 and {row.times for row in rows} == {9}


@pytest.mark.parametrize(
    "groups, axes, members",
    [
        ("replica_groups=[2,4]<=[8]", ("fsdp",), 4),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", ("data", "fsdp"), 8),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ("fsdp",), 4),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ("data",), 2),
        ("replica_groups={}", ("data", "fsdp"), 8),
    ],
)
def test_notations_of_groups(groups, axes, members):
    lines = (
        "ENTRY %m (x: f32[8]) -> f32[8] {",
        "  %x = f32[8]{0} parameter(0)",
        f"  %y = f32[8]{{0}} all-reduce(%x), {groups}",
    )
    assert traffic("\n".join(lines), MESH)[0] == [Traffic("all-reduce", axes, 1, 2 * 32 * (members - 1) // members)]


def test_sizes_of_types():
    assert type_bytes("bf16[1,1024]{1,0:T(8,128)(2,1)S(1)}") == 2048
    assert type_bytes("(f32[2,3]{1,0}, pred[5], /*index=2*/s4[4], f8e4m3fn[3], token[])") == 24 + 5 + 2 + 3
    assert [i.opcode for i in parse(LOOP)[0]["cond"]] == ["constant", "parameter", "get-tuple-element", "compare"]
