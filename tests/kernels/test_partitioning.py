"""Plans of sharded ops, without a device: who gets a mesh axis, what is reduced, moved, refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from qwix_kernels import partitioning
from qwix_kernels.matmul import matmul, problem_of
from qwix_kernels.matmul.partition import layout_of, plan_of
from qwix_kernels.problem import Extras, Tensor

XY = ("x", "y")
MESH = {"x": 2, "y": 4}
B, M, K, N = 2, 16, 64, 32


def problem(tiles=1, transposed=False, n=N):
    order = (0, 2, 1) if transposed else (0, 1, 2)
    shape = lambda *s: tuple(s[a] for a in order)
    w = Tensor(
        jax.ShapeDtypeStruct(shape(1, K, n), jnp.int8), jax.ShapeDtypeStruct(shape(1, tiles, n), "float32")
    )
    return problem_of(jax.ShapeDtypeStruct((B, M, K), jnp.float32), w, rhs_transposed=transposed)


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "cut", "results", "reduced"),
    [
        (P("x"), P(None, None, "y"), None, {"b": "x", "n": "y"}, P("x", None, "y"), ""),
        (P(None, "x"), P(None, None, "y"), None, {"m": "x", "n": "y"}, P(None, "x", "y"), ""),
        (P(None, None, "y"), P(None, "y"), None, {"k": "y"}, P(None, None, None), "y"),
        (P("x"), P(None, "y"), None, {"b": "x", "k": "y"}, P("x", None, None), "y"),  # lhs takes its part
        (P(None, None, "y"), P(None, None, "y"), None, {"n": "y"}, P(None, None, "y"), ""),
        # Sums scattered along M and along N.
        (P(None, "x", "y"), P(None, "y"), P(None, XY), {"m": "x", "k": "y"}, P(None, XY, None), "y"),
        (P(None, "x", "y"), P(None, "y"), P(None, "x", "y"), {"m": "x", "k": "y"}, P(None, "x", "y"), "y"),
        # Not scattered: the result is wanted in another order than shards have it.
        (P(None, "x", "y"), P(None, "y"), P(None, ("y", "x")), {"m": "x", "k": "y"}, P(None, "x", None), "y"),
        # What the result is wanted to be decides who keeps an axis that both have.
        (P(None, "y"), P(None, None, "y"), None, {"m": "y"}, P(None, "y", None), ""),
        (P(None, "y"), P(None, None, "y"), P(None, None, "y"), {"n": "y"}, P(None, None, "y"), ""),
        # A result that is wanted cut along what no operand is cut along.
        (P(), P(), P(None, "x", "y"), {"m": "x", "n": "y"}, P(None, "x", "y"), ""),
    ],
)  # fmt: skip
def test_who_gets_an_axis(lhs, rhs, out, cut, results, reduced):
    plan = plan_of(problem(), MESH, lhs, rhs, out)
    assert {f: a[0] for f, a in plan.cut if a and not f.isupper()} == cut
    assert plan.results == (results,) and "".join(plan.reduced) == reduced


def test_what_is_gathered_is_said():
    fsdp = plan_of(problem(), MESH, P("x"), P(None, "x", "y"))
    assert fsdp.moved == ("rhs is gathered along k: 'x' cuts b",)
    assert "rhs is gathered along k: 'x' cuts b" in str(fsdp)
    assert plan_of(problem(), MESH, P(None, None, "y"), P(None, None, "y")).moved == (
        "lhs is gathered along k: 'y' cuts n",
    )
    assert not plan_of(problem(), MESH, P("x"), P(None, None, "y")).moved


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tiles", [1, 2, 4, 8, 32])
def test_scales_are_cut_or_whole(tiles, transposed):
    """K in 4 shards of 16: tiles of 16 and less are cut, longer ones lie in several shards."""
    spec = P(None, None, "y") if transposed else P(None, "y", None)
    plan = plan_of(problem(tiles, transposed), MESH, P(), spec)
    assert plan.operands[1] == spec
    assert plan.operands[2] == (spec if tiles >= 4 else P(None, None, None))


@pytest.mark.parametrize(("full", "entries"), [(48, 6), (48, 3), (60, 5), (64, 2), (64, 16)])
def test_each_shard_takes_the_entries_of_its_runs(full, entries):
    """Of tiles that straddle shards and shards that straddle tiles: every element finds its own entry."""
    dim = partitioning.Dim("k", full)
    layout = partitioning.Layout(("a",), ((dim,),), ((full,),), ((),), ((),), ((0, 0),), ("k",))
    plan = partitioning.make_plan(layout, {"y": 4}, [P("y")])
    part, tile = full // 4, full // entries
    for shard in range(4):
        own = dataclasses.replace(plan)
        object.__setattr__(own, "index", lambda factor, shard=shard: jnp.int32(shard))
        taken = own.entries(dim, entries)
        run = part // len(taken)
        assert run == math.gcd(part, tile)
        assert [int(taken[i // run]) for i in range(part)] == [
            (shard * part + i) // tile for i in range(part)
        ]


def test_shardy_propagates_through_values_and_not_through_tiles():
    p = problem(tiles=2)
    leaves = (
        Tensor(jax.ShapeDtypeStruct((B, M, K), "float32")),
        Tensor(jax.ShapeDtypeStruct((1, K, N), "int8"), jax.ShapeDtypeStruct((1, 2, N), "float32")),
        Extras(),
    )
    assert partitioning.sharding_rule(layout_of(p, leaves)) == "f0 f1 f2, u0 f2 f3, u1 u2 f3 -> f0 f1 f3"


# --- bad input


def test_an_axis_that_the_mesh_does_not_have():
    with pytest.raises(ValueError, match=r"names the mesh axis 'z'; the mesh has 'x' \(2\), 'y' \(4\)"):
        plan_of(problem(), MESH, P("z"), P())
    with pytest.raises(ValueError, match="has 4 entries for an array of 3 axes"):
        plan_of(problem(), MESH, P(None, None, None, "x"), P())


@pytest.mark.parametrize(("rhs", "out"), [(P(None, None, "y"), None), (P(), P(None, None, "y"))])
def test_a_size_that_does_not_divide(rhs, out):
    message = r"of size 30 can't be cut over 'y' \(4\): 4 parts don't divide it. What does: 1, 2, 3, 5, 6"
    with pytest.raises(ValueError, match=message):
        plan_of(problem(n=30), MESH, P(), rhs, out)


def test_an_out_sharding_that_cannot_be():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((1, 4, 8)), NamedSharding(mesh, P()))
        w = jnp.ones((1, 8, 6), jnp.int8)
        with pytest.raises(ValueError, match=r"Axis N of size 6 can't be cut over 'y' \(4\)"):
            matmul(jax.device_put(x, NamedSharding(mesh, P(None, "x"))), w, out_sharding=P(None, None, "y"))
        with pytest.raises(ValueError, match="names the mesh axis 'model'; the mesh has 'x'"):
            matmul(jax.device_put(x, NamedSharding(mesh, P(None, "x"))), w, out_sharding=P("model"))
