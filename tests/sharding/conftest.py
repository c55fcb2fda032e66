"""How the tests of sharded ops place arrays, run them on the eight virtual devices, and count collectives."""

import re
import types
from collections import Counter

import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

KINDS = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
_COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"


def mesh_of(route, shape=(2, 4)):
    """A mesh with axes x and y whose layouts are types ("explicit") or the compiler's ("auto")."""
    return jax.make_mesh(shape, ("x", "y"), axis_types=(KINDS[route],) * 2)


def place(mesh, tree, spec):
    """The arrays laid out as `spec`, but for axes that it doesn't divide, as of scales."""

    def one(x):
        sizes = [mesh.shape[e] if isinstance(e, str) else 1 for e in (*spec, *(None,) * x.ndim)]
        fits = [e if n % size == 0 else None for e, n, size in zip(spec, x.shape, sizes, strict=False)]
        return jax.device_put(x, NamedSharding(mesh, P(*fits)))

    return jax.tree.map(one, tree)


def run(mesh, fn, *args):
    """(the result, {collective: how many}) of fn on placed arrays."""
    with jax.set_mesh(mesh):
        compiled = jax.jit(fn).lower(*args).compile()
        return compiled(*args), collectives(compiled.as_text())


def collectives(text):
    """How many of each collective a compiled program has."""
    return dict(Counter(m[1] for m in re.finditer(rf" ({_COLLECTIVES})(?:-start)?\(", text)))


def spec_of(x):
    """How a result is laid out, one entry for each axis."""
    return P(*x.sharding.spec, *(None,) * (x.ndim - len(x.sharding.spec)))


@pytest.fixture(scope="session")
def on(devices):
    """The functions above."""
    del devices  # there are eight
    return types.SimpleNamespace(
        mesh_of=mesh_of, place=place, run=run, collectives=collectives, spec_of=spec_of
    )
