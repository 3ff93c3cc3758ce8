"""Collectives read from compiled programs: sizes, groups and how often they run."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from geomjax.compiled import collectives
from geomjax.meshes import mesh_from_string


def on(mesh, *axes):
    return NamedSharding(mesh, PartitionSpec(*axes))


def test_a_gather_in_a_scan_runs_once_a_layer():
    mesh = mesh_from_string("data=2,fsdp=4")
    rows = on(mesh, ("data", "fsdp"))

    def forward(weights, x):
        def layer(x, weight):
            x = jax.lax.with_sharding_constraint(x, rows)
            return jnp.tanh(x @ weight), None

        return (jax.lax.scan(layer, x, weights)[0] ** 2).sum()

    weights = jax.device_put(jnp.ones((5, 64, 32)).repeat(2, 2), on(mesh, None, "fsdp"))
    x = jax.device_put(jnp.ones((16, 64)), rows)
    text = jax.jit(forward).lower(weights, x).compile().as_text()
    gather, total = collectives(text)
    assert gather[:6] == ("all-gather", "f32", (64, 64), 4 * 64 * 64, 4, 5)
    assert len(gather.loops) == 1
    assert gather.op_name.endswith("dot_general")
    assert gather.sent_bytes == 4 * 64 * 64 * 3 / 4
    assert total[:6] == ("all-reduce", "f32", (), 4, 8, 1)
    assert total.loops == ()
    assert total.sent_bytes == 2 * 4 * 7 / 8


def test_sums_that_a_program_asks_for_itself_are_told_apart():
    """XLA gives all of them one channel."""
    mesh = mesh_from_string("data=2,fsdp=4")
    axes = ("data", "fsdp")

    rows, whole = PartitionSpec(axes), PartitionSpec()

    @partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=(whole, rows))
    def program(x):
        return jax.lax.psum(x.sum(axis=0), axes), jax.lax.psum(x[:, :3], "fsdp")

    text = jax.jit(program).lower(jnp.ones((8, 16))).compile().as_text()
    assert text.count("channel_id=1,") == 2
    found = {(c.kind, c.shape, c.group_size) for c in collectives(text)}
    assert found == {("all-reduce", (16,), 8), ("all-reduce", (1, 3), 4)}

    @partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=whole)
    def twice(x):
        return jax.lax.psum(jnp.tanh(jax.lax.psum(x.sum(axis=0), axes)), axes)

    text = jax.jit(twice).lower(jnp.ones((8, 16))).compile().as_text()
    assert text.count("channel_id=1,") == 2
    assert [c.shape for c in collectives(text)] == [(16,), (16,)]


def test_loops_multiply_and_a_condition_bounds_one_that_depends_on_data():
    mesh = mesh_from_string("data=8")

    def program(x):
        def unfinished(carry):
            step, x = carry
            return (step < 7) & (x.sum() < 1e9)

        def body(carry):
            step, x = carry
            inner = jax.lax.fori_loop(0, 3, lambda i, x: x + jnp.max(x * i), x)
            return step + 1, inner

        return jax.lax.while_loop(unfinished, body, (1, x))[1]

    x = jax.device_put(jnp.ones((16, 64)), on(mesh, "data"))
    text = jax.jit(program).lower(x).compile().as_text()
    found = {(c.op_name.rsplit("/", 1)[1], c.trip_count) for c in collectives(text)}
    assert found == {("reduce_max", 21), ("reduce_sum", 7)}
    depths = {c.trip_count: len(c.loops) for c in collectives(text)}
    assert depths == {21: 2, 7: 1}


TEXT = """HloModule jit_f, num_partitions=16

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%start.1 (p: bf16[2,4]) -> bf16[8,4] {
  ROOT %g.1 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=9, replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_1'}, dimensions={0}
}

%fused.2 (p: bf16[2,4]) -> bf16[8,4] {
  ROOT %g.2 = bf16[8,4]{1,0} all-gather(%p), channel_id=9, replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_1'}, dimensions={0}
}

%all-reduce-scatter.3 (p: f32[8,4]) -> f32[2,4] {
  %r = f32[8,4]{1,0} all-reduce(%p), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %s = f32[2,4]{1,0} dynamic-slice(%r, %i, %j), dynamic_slice_sizes={2,4}
}

%body (t: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %a.1 = bf16[8,4]{1,0} fusion(%t), kind=kCustom, calls=%start.1
  %a.2 = bf16[8,4]{1,0} fusion(%t), kind=kOutput, calls=%fused.2
  ROOT %out = (s32[], bf16[2,4]) tuple(%i, %p)
}

%condition (t: (s32[], bf16[2,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%never (p: f32[2]) -> f32[2] {
  ROOT %lost = f32[2]{0} all-reduce(%p), channel_id=77, to_apply=%add
}

ENTRY %main (x: f32[8,4]) -> f32[2,4] {
  %loop = (s32[]{:T(128)}, /*index=1*/bf16[2,4]) while(%t), condition=%condition, body=%body
  %fusion = f32[2,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
  %both = (f32[4]{0}, s8[6]{0}) all-reduce(%p, %q), channel_id=1, replica_groups=[2,8]<=[16], to_apply=%add
  %rs = f32[2,4]{1,0} reduce-scatter(%x), channel_id=2, replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}, to_apply=%add
  %started = (f32[1,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%x), channel_id=3, replica_groups=mesh['x'=4,'y'=4] {'x','y':(1)2}, dimensions={0}
  %done = f32[8,4]{1,0} all-gather-done(%started)
  %moved = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=4, source_target_pairs={{0,1}}
  ROOT %last = pred[]{:T(256)} all-reduce(%v), channel_id=6, replica_groups={}, to_apply=%add, metadata={op_name="jit(f)/any"}
}
"""  # noqa: E501


def test_every_form_in_which_xla_writes_a_collective():
    """Hand-written after the text of TPU programs."""
    found = [c[:6] for c in collectives(TEXT)]
    assert found == [
        ("all-gather", "bf16", (8, 4), 64, 4, 6),  # Once, though written twice.
        ("reduce-scatter", "f32", (8, 4), 128, 4, 1),
        ("all-reduce", "f32", (4,), 16, 8, 1),
        ("all-reduce", "s8", (6,), 6, 8, 1),
        ("reduce-scatter", "f32", (8, 4), 128, 4, 1),
        ("all-gather", "f32", (8, 4), 128, 8, 1),
        ("collective-permute", "f32", (3,), 12, 16, 1),
        ("all-reduce", "pred", (), 1, 16, 1),
    ]
    assert collectives(TEXT)[-1].op_name == "jit(f)/any"
    sent = [c.sent_bytes for c in collectives(TEXT)]
    assert sent[:3] == [64 * 3 / 4, 128 * 3 / 4, 2 * 16 * 7 / 8]
    assert sent[6] == 12


UNROLLED = """HloModule jit_f, num_partitions=4

%body (t: (u32[], bf16[2])) -> (u32[], bf16[2]) {
  %two = u32[]{:T(128)} constant(2)
  %t = (u32[], bf16[2]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[2]{0} get-tuple-element(%t), index=1
  %next = u32[]{:T(128)} add(%i, %two), metadata={op_name="f"}
  %once = bf16[2]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1}}
  %twice = bf16[2]{0} collective-permute(%once), channel_id=2, source_target_pairs={{0,1}}
  ROOT %out = (u32[]{:T(128)}, /*index=1*/bf16[2]{0}) tuple(%next, %twice)
}

%condition (t: (u32[], bf16[2])) -> pred[] {
  %n = u32[]{:T(128)} constant(7)
  %t = (u32[], bf16[2]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[2]) -> (u32[], bf16[2]) {
  ROOT %loop = (u32[], bf16[2]) while(%t), condition=%condition, body=%body
}
"""  # noqa: E501


def test_a_loop_that_the_compiler_unrolled_runs_less_often():
    """As it writes the products that it overlaps with the gathering of a weight."""
    assert [c.trip_count for c in collectives(UNROLLED)] == [4, 4]
    forward = UNROLLED.replace("add(%i, %two)", "add(%two, %i)")
    assert [c.trip_count for c in collectives(forward)] == [4, 4]
    other = UNROLLED.replace("add(%i, %two)", "add(%x, %two)")
    assert [c.trip_count for c in collectives(other)] == [7, 7]


def test_a_loop_whose_end_nothing_tells_is_said_to_be_unknown():
    text = TEXT.replace("constant(6)", "parameter(1)")
    assert collectives(text)[0].trip_count is None
    assert collectives(text)[1].trip_count == 1


def test_what_is_no_compiled_program_is_refused():
    lowered = jax.jit(lambda x: x + 1).lower(1.0).as_text()
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives(lowered)
