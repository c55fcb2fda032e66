"""Ops compiled for whole TPU slices that are not attached: a kernel in each shard, the planned collectives.

Automatic sharding isn't here: the compiler's client for devices that are not attached asks nobody how to cut
an op, so there the portable path runs, and says so.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from qwix_kernels import dispatch
from qwix_kernels.conv import conv
from qwix_kernels.matmul import matmul
from qwix_kernels.problem import RowQuantize, Tensor
from qwix_kernels.ragged_matmul import gmm

from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt

TOPOLOGIES = ["v5e:4x4", "v6e:4x4", "tpu7x:2x2x2"]
FAST = ["v5e:4x4"]
INT8 = RowQuantize("int8", 127.5)
M, K, N, G = 512, 2048, 2048, 8


@pytest.fixture(scope="module")
def devices_of():
    found = {}

    def of(name):
        if name not in found:
            described = topologies.get_topology_desc(platform="tpu", topology_name=name)
            found[name] = np.array(described.devices).reshape(4, -1)
        return found[name]

    return of


class Slice:
    """A mesh over a topology, with compiled programs' kernels and collectives."""

    def __init__(self, devices, kind, on):
        self.mesh = Mesh(devices, ("x", "y"), axis_types=(kind,) * 2)
        self.on = on

    def array(self, shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def compiled(self, fn, *args):
        """(how many kernels a shard runs, {collective: how many})"""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            text = jax.jit(fn).lower(*args).compile().as_text()
        return text.count('custom_call_target="tpu_custom_call"'), self.on.collectives(text)


def weights(mesh, spec, dtype="int8", tiles=1, lead=1):
    whole = [None if e == spec[1] and tiles == 1 else e for e in spec]
    scale = mesh.array((lead, tiles, N), jnp.float32, P(*whole))
    return Tensor(mesh.array((lead, K, N), dtype, spec), scale)


def marked(names):
    return [n if n in FAST else pytest.param(n, marks=pytest.mark.large) for n in names]


# --- the types of operands say how they are laid out


SUMS = P(None, "x", "y"), P(None, "y", None), {"all-reduce": 2}
COLUMNS = P(None, "x", None), P(None, None, "y"), {}


@pytest.mark.parametrize("layout", [COLUMNS, SUMS], ids=["columns", "sums"])
@pytest.mark.parametrize("topology", marked(TOPOLOGIES))
def test_matmul_of_explicit_types(topology, layout, devices_of, on):
    lhs, rhs, collectives = layout
    mesh = Slice(devices_of(topology), AxisType.Explicit, on)
    x, w = mesh.array((1, M, K), jnp.bfloat16, lhs), weights(mesh, rhs)
    kernels, found = mesh.compiled(lambda x, w: matmul(x, w, quantize_lhs=INT8), x, w)
    assert (kernels >= 1, found) == (True, collectives)


@pytest.mark.parametrize("topology", marked(TOPOLOGIES))
def test_weights_of_4_bits_and_a_result_that_is_cut(topology, devices_of, on):
    mesh = Slice(devices_of(topology), AxisType.Explicit, on)
    x = mesh.array((1, M, K), jnp.bfloat16, P(None, "x", "y"))
    w = weights(mesh, P(None, "y", None), "int4", K // 128)
    fn = lambda x, w: matmul(x, w, out_sharding=P(None, "x", "y"))
    kernels, found = mesh.compiled(fn, x, w)
    # The TPU compiler may make an all-reduce of a small reduce-scatter.
    assert kernels >= 1 and sum(found.values()) == 1 and not {*found} - {"reduce-scatter", "all-reduce"}


@pytest.mark.parametrize("topology", marked(TOPOLOGIES))
def test_gradients_of_explicit_types(topology, devices_of, on):
    mesh = Slice(devices_of(topology), AxisType.Explicit, on)
    x = mesh.array((1, M, K), jnp.bfloat16, P(None, "x", None))
    loss = lambda x, w: matmul(x, w, quantize_lhs=INT8).astype(jnp.float32).sum()
    kernels, found = mesh.compiled(jax.grad(loss), x, weights(mesh, P(None, None, "y")))
    assert kernels >= 1 and found == {"all-reduce": 1}


@pytest.mark.parametrize("topology", marked(TOPOLOGIES))
def test_experts_of_explicit_types(topology, devices_of, on):
    mesh = Slice(devices_of(topology), AxisType.Explicit, on)
    x = mesh.array((M, K), jnp.bfloat16, P("x", None))
    sizes = mesh.array((G,), jnp.int32, P())
    w = weights(mesh, P("y", None, None), lead=G)
    kernels, found = mesh.compiled(lambda *a: gmm(*a, quantize_lhs=INT8), x, w, sizes)
    assert kernels >= 1 and found == {"all-reduce": 1}


@pytest.mark.large
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("rhs", [P(None, "y"), P("y", None)])
def test_a_quantized_training_step_of_explicit_types(topology, rhs, devices_of, on):
    """Forward and both gradients in kernels; `lhs` is cut as the sum is."""
    mesh = Slice(devices_of(topology), AxisType.Explicit, on)
    qtypes = {f"{name}_qtype": "int8" for name in ("lhs", "rhs", "dlhs_grad", "drhs_grad")}
    config = DotGeneralQtConfig(**qtypes, disable_gradient_clipping=True)
    dot = lambda x, w: dot_general_qt(x, w, (((2,), (0,)), ((), ())), config)
    x = mesh.array((8, 128, 1024), jnp.bfloat16, P("x", None, rhs[0]))
    w = mesh.array((1024, 2048), jnp.bfloat16, rhs)
    loss = lambda x, w: (dot(x, w).astype(jnp.float32) ** 2).sum()
    kernels, found = mesh.compiled(jax.grad(loss, (0, 1)), x, w)
    assert kernels >= 3 and set(found) == {"all-reduce"}


# --- inside shard_map, with what varies checked


@pytest.mark.parametrize("topology", marked(TOPOLOGIES))
def test_matmul_and_its_gradient_inside_shard_map(topology, devices_of, on):
    mesh = Slice(devices_of(topology), AxisType.Auto, on)
    lhs, rhs = P(None, "x", "y"), P(None, "y", None)
    shard = lambda x, w: jax.lax.psum(matmul(x, w, quantize_lhs=INT8, out_dtype="float32"), "y")
    specs = lhs, Tensor(rhs, P())
    fn = jax.shard_map(shard, mesh=mesh.mesh, in_specs=specs, out_specs=P(None, "x"))
    x, w = mesh.array((1, M, K), jnp.bfloat16, lhs), weights(mesh, rhs)
    kernels, found = mesh.compiled(fn, x, w)
    assert kernels >= 1 and found == {"all-reduce": 1}
    kernels, found = mesh.compiled(jax.grad(lambda x, w: fn(x, w).sum()), x, w)
    assert kernels >= 1 and "all-gather" not in found


@pytest.mark.large
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_experts_and_images_inside_shard_map(topology, devices_of, on):
    mesh = Slice(devices_of(topology), AxisType.Auto, on)

    def experts(x, w, sizes):
        offset = jax.lax.axis_index("y") * w.values.shape[0]
        return jax.lax.psum(gmm(x, w, sizes, quantize_lhs=INT8, group_offset=offset), "y")

    specs = P("x"), Tensor(P("y"), P("y")), P()
    x, sizes = mesh.array((M, K), jnp.bfloat16, P("x")), mesh.array((G,), jnp.int32, P())
    fn = jax.shard_map(experts, mesh=mesh.mesh, in_specs=specs, out_specs=P("x"))
    kernels, found = mesh.compiled(fn, x, weights(mesh, P("y", None, None), lead=G), sizes)
    assert kernels >= 1 and found == {"all-reduce": 1}
    images = mesh.array((64, 16, 16, 256), jnp.bfloat16, P("x"))
    spec = P(None, None, None, "y")
    values = mesh.array((3, 3, 256, 512), jnp.int8, spec)
    w = Tensor(values, mesh.array((1, 1, 1, 512), jnp.float32, spec))
    run = lambda x, w: conv(x, w, quantize_lhs=INT8, padding=((1, 1), (1, 1)))
    fn = jax.shard_map(run, mesh=mesh.mesh, in_specs=(P("x"), spec), out_specs=P("x", None, None, "y"))
    kernels, found = mesh.compiled(fn, images, w)
    assert not found


def test_automatic_sharding_says_what_to_do(devices_of, on):
    mesh = Slice(devices_of(FAST[0]), AxisType.Auto, on)
    x, w = mesh.array((1, M, K), jnp.bfloat16, P()), weights(mesh, P(None, None, "y"))
    dispatch._WARNED.clear()
    with pytest.warns(UserWarning, match="cannot partition a kernel over 16 devices; call the op inside jax"):
        kernels, found = mesh.compiled(lambda x, w: matmul(x, w, quantize_lhs=INT8), x, w)
    assert not kernels and "all-gather" not in found
