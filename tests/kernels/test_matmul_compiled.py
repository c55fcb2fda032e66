"""What the TPU's compiler makes of a matmul under transformations: kernels, and nothing done to operands."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from qwix_kernels.chips import CHIPS
from qwix_kernels.matmul import matmul, problem_of, reference, tpu_stored
from qwix_kernels.problem import Extras, RowQuantize, Tensor

from bench import compiled
from bench.tpu_compile import compile_for

M, K, N, BATCH = 48, 512, 384, 3
ROWS = RowQuantize("int8", 127.5)


def operands(batch=(), *, transposed=False, weight="int8", rows=M):
    """(activations, weight) without data, of these batch sizes on either side."""
    left, right = batch or ((), ())
    struct = jax.ShapeDtypeStruct
    shape, scale = ((N, K), (N, 1)) if transposed else ((K, N), (1, N))
    rhs = Tensor(struct((*right, 1, *shape), weight), struct((*right, 1, *scale), "bfloat16"))
    return struct((*left, 1, rows, K), "bfloat16"), rhs


def text_of(fn, *args, chip="v5e") -> str:
    return compile_for(chip, fn, *args).as_text()


def assert_one_kernel_and_no_copies(text: str, *shapes: tuple[int, ...]):
    assert compiled.kernels(text).total() == 1
    assert " while(" not in text
    assert compiled.relayouts(text, [int(np.prod(shape)) for shape in shapes]) == []


def op(lhs, rhs):
    return matmul(lhs, rhs, quantize_lhs=ROWS, out_dtype=jnp.bfloat16, implementation="mosaic_tpu")


@pytest.mark.parametrize("mapped", ["both", "lhs", "rhs"])
def test_vmap_gives_one_batched_kernel(mapped):
    sizes = ((BATCH,) if mapped != "rhs" else (), (BATCH,) if mapped != "lhs" else ())
    axes = tuple(0 if size else None for size in sizes)
    args = operands(sizes)
    text = text_of(jax.vmap(op, in_axes=axes), *args)
    assert_one_kernel_and_no_copies(text, (BATCH, M, K), (BATCH, K, N), (K, N), (M, K))
    assert jax.eval_shape(jax.vmap(op, in_axes=axes), *args).shape == (BATCH, 1, M, N)


def test_vmap_of_vmap():
    def twice(lhs, rhs):
        return jax.vmap(jax.vmap(op, in_axes=(0, None)), in_axes=(0, 0))(lhs, rhs)

    lhs, rhs = operands(((2, BATCH), (2,)))
    assert_one_kernel_and_no_copies(text_of(twice, lhs, rhs), (2, BATCH, M, K), (2, K, N))


@pytest.mark.parametrize("chip", ["v5e", "v7x"])
def test_transposed_weights_are_read_as_they_lie(chip):
    def transposed(lhs, rhs):
        return matmul(lhs, rhs, quantize_lhs=ROWS, rhs_transposed=True, implementation="mosaic_tpu")

    text = text_of(transposed, *operands(transposed=True), chip=chip)
    assert_one_kernel_and_no_copies(text, (N, K), (M, K))


def test_batched_operands_like_those_of_attention():
    """[heads, queries, size] times [heads, keys, size], both quantized beforehand."""
    heads, queries, keys, size = 6, 256, 384, 128
    struct = jax.ShapeDtypeStruct
    lhs = Tensor(struct((heads, queries, size), "int8"), struct((heads, queries, 1), "float32"))
    rhs = Tensor(struct((heads, keys, size), "int8"), struct((heads, keys, 1), "float32"))

    def scores(lhs, rhs):
        return matmul(lhs, rhs, rhs_transposed=True, implementation="mosaic_tpu")

    text = text_of(scores, lhs, rhs)
    assert_one_kernel_and_no_copies(text, (heads, queries, size), (heads, keys, size))


def test_a_copy_would_be_seen():
    """The axes of the weight are in another order than a kernel reads: XLA copies it, and we notice."""

    def permuted(lhs, values, scale):
        return op(lhs, Tensor(jnp.moveaxis(values, 0, 1).reshape(1, K, N), scale))

    struct = jax.ShapeDtypeStruct
    values, scale = struct((3, K, N // 3), "int8"), struct((1, 1, N), "bfloat16")
    text = text_of(permuted, struct((1, M, K), "bfloat16"), values, scale)
    assert compiled.kernels(text).total() == 1
    assert compiled.relayouts(text, [K * N])


def test_equal_matmuls_are_equal_kernels():
    """Layers of one shape differ in their operands alone, so that the compiler may share what it did."""

    def layers(lhs, weights):
        for weight in weights:
            lhs = matmul(lhs, weight, quantize_lhs=ROWS, out_dtype=jnp.bfloat16, implementation="mosaic_tpu")
        return lhs

    struct = jax.ShapeDtypeStruct
    weight = Tensor(struct((1, K, K), "int8"), struct((1, 1, K), "bfloat16"))
    text = text_of(layers, struct((1, M, K), "bfloat16"), [weight] * 4)
    found = compiled.kernels(text)
    assert found.total() == 4
    assert len(found) <= 3  # the first and the last may have operands in another memory


def test_counting():
    text = """
ENTRY %main (a: s8[4,8]) -> s8[8,4] {
  %a = s8[4,8]{1,0} parameter(0)
  %prefetch = (s8[4,8]{1,0:S(1)}, s8[4,8]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %there = s8[4,8]{1,0:S(1)} copy-done(%prefetch)
  %kernel = f32[4,4]{1,0} custom-call(%there), custom_call_target="tpu_custom_call", backend_config={"a":1}
  %again = f32[4,4]{1,0} custom-call(%there), custom_call_target="tpu_custom_call", backend_config={"a":2}
  ROOT %t = s8[8,4]{1,0} transpose(%there), dimensions={1,0}
}"""
    assert compiled.executed(text) == 3
    assert sorted(compiled.kernels(text).values()) == [1, 1]
    assert [line.split(" = ")[0] for line in compiled.relayouts(text, [32])] == ["t"]
    assert compiled.relayouts(text, [16]) == []


# --- calls, not compiles


@pytest.fixture
def compiles():
    """A list that grows by one with every program that is compiled."""
    seen = []

    def listen(event: str, seconds: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("jitted", [True, False])
def test_a_second_call_compiles_nothing(compiles, jitted):
    weight = Tensor(jnp.ones((1, 64, 24), jnp.int8), jnp.ones((1, 1, 24)))
    run = lambda x, w: matmul(x, w, quantize_lhs=ROWS)
    run = jax.jit(run) if jitted else run
    rng = np.random.default_rng(0)
    run(jnp.asarray(rng.normal(size=(1, 5, 64)), jnp.float32), weight)
    assert compiles
    other = jnp.asarray(rng.normal(size=(1, 5, 64)), jnp.float32)
    compiles.clear()
    run(other, weight)
    assert not compiles
    run(jnp.zeros((1, 6, 64)), weight)
    assert compiles, "a new shape is a new program: the listener listens"


# --- the order in which a TPU keeps a weight

SIZES = [(576, 192), (1536, 576), (576, 576), (576, 1536), (192, 576), (100, 300), (300, 100), (64, 64)]
SIZES += [(72, 128), (128, 72), (4096, 1000), (1000, 4096), (130, 129), (8, 100), (512, 64), (2560, 320)]


@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
def test_the_order_is_that_of_the_compilers_default_layouts(dtype):
    weights = [jax.ShapeDtypeStruct(shape, dtype) for size in SIZES for shape in (size, (1, *size))]
    text = text_of(lambda *arrays: [jnp.sum(a.astype(jnp.float32)) for a in arrays], *weights)
    layouts = re.findall(r"\[[\d,]+\]\{(\d)", text[text.index("entry_computation_layout") :].split("->")[0])
    assert len(layouts) == len(weights)
    found = [int(minor) == len(w.shape) - 2 for minor, w in zip(layouts, weights, strict=True)]
    assert found == [bool(tpu_stored.keeps_k_last(*w.shape[-2:])) for w in weights]
    assert any(found) and not all(found)


@pytest.mark.parametrize("chip", ["v5e", "v7x"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("k_n", [(1536, 576), (576, 1536)])
def test_weights_of_odd_sizes_are_not_copied(chip, transposed, k_n):
    k, n = k_n
    struct = jax.ShapeDtypeStruct
    shape, scale = ((1, n, k), (1, n, 1)) if transposed else ((1, k, n), (1, 1, n))
    rhs = Tensor(struct(shape, "int8"), struct(scale, "bfloat16"))

    def run(lhs, rhs):
        return matmul(lhs, rhs, quantize_lhs=ROWS, rhs_transposed=transposed, implementation="mosaic_tpu")

    text = text_of(run, struct((1, 16, k), "bfloat16"), rhs, chip=chip)
    assert_one_kernel_and_no_copies(text, (k, n))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_turned_weight_is_the_same_weight(gated, transposed):
    """With a gate too, which lies as the weight does."""
    rng = np.random.default_rng(0)
    k, n = (64, 256) if transposed else (256, 64)
    shape, scale = ((1, n, k), (1, n, 1)) if transposed else ((1, k, n), (1, 1, n))

    def weight():
        values = jnp.asarray(rng.integers(-128, 128, shape), jnp.int8)
        return Tensor(values, jnp.asarray(rng.uniform(0.5, 1, scale), jnp.float32))

    lhs, rhs = Tensor(jnp.asarray(rng.normal(size=(1, 8, k)), jnp.float32)), weight()
    extras, options = Extras(gate=weight()) if gated else Extras(), {"rhs_transposed": transposed}
    problem = problem_of(lhs, rhs, extras, quantize_lhs=ROWS, activation="relu" if gated else None, **options)
    chip = CHIPS["v5e"]
    assert tpu_stored.as_kept(problem, chip).rhs_transposed != transposed
    config = tpu_stored.heuristic_config(problem, chip)
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    got = tpu_stored.run(problem, lhs, rhs, extras, config=config, chip=chip, interpret=interpret)
    error = np.abs(np.asarray(got, np.float64) - reference.run(problem, lhs, rhs, extras))
    assert (error <= reference.error_bound(problem, lhs, rhs, extras)).all()
