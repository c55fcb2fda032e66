"""N:M masks, and the noise of stochastic rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwix
from qwix._src.core import qarray, sparsity, stochastic_rounding


def test_the_default_rule_prunes_nothing(normal):
    x = normal(0, 4, 6)
    np.testing.assert_array_equal(qarray.sparsify(x, qwix.SparsityRule()), x)


def test_two_of_four_are_kept_along_either_axis():
    x = jnp.array([[1.0, -3, 2, 0], [5, 5, 5, 5]])
    mask = sparsity.get_sparsity_mask(x, 2, 4)
    np.testing.assert_array_equal(mask, [[False, True, True, False], [True, True, False, False]])
    np.testing.assert_array_equal(sparsity.get_sparsity_mask(x.T, 2, 4, order="C"), mask.T)
    rule = qwix.SparsityRule(weight_sparsity_n=2, weight_sparsity_m=4)
    np.testing.assert_array_equal(qarray.sparsify(x, rule), jnp.where(mask, x, 0))


def test_blocks_and_offsets():
    x = jnp.array([1.0, 1, 9, 0, 2, 2, 0, 0])
    block = sparsity.get_sparsity_mask(x, 1, 2, block_size=2)
    np.testing.assert_array_equal(block, [False, False, True, True, True, True, False, False])
    apart = sparsity.get_sparsity_mask(x, 1, 2, offset=4)  # pairs (0, 4), (1, 5), (2, 6), (3, 7)
    np.testing.assert_array_equal(apart, [False, False, True, True, True, True, False, False])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_sparsity": 3, "m_sparsity": 2}, "n=3, m=2"),
        ({"n_sparsity": 1, "m_sparsity": 2, "order": "X"}, "order"),
        ({"n_sparsity": 1, "m_sparsity": 2, "order": "C"}, "two axes"),
        ({"n_sparsity": 1, "m_sparsity": 2, "offset": -1}, "negative"),
        ({"n_sparsity": 1, "m_sparsity": 3}, "divisible by m=3"),
    ],
)
def test_rules_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sparsity.get_sparsity_mask(jnp.ones(8), **options)


def test_noise_is_within_half_a_step_and_varies_along_its_axes():
    key = jax.random.key(0)
    for method in ("uniform", "low_bit_uniform"):
        noise = stochastic_rounding.get_noise_fn(method, key, (1,))((4, 1000))
        assert noise.shape == (1, 1000) and noise.dtype == jnp.float32
        assert float(jnp.abs(noise).max()) <= 0.5 and abs(float(noise.mean())) < 0.05
    with pytest.raises(ValueError, match="Unknown method"):
        stochastic_rounding.get_noise_fn("gaussian", key)((4,))


def test_pruning_starts_and_is_updated_when_the_rule_says(normal):
    """Steps 0 and 1 keep all; masks are found at steps 2 and 5 and stay in between; evaluation keeps one."""
    rule = qwix.SparsityRule(
        weight_sparsity_n=1,
        weight_sparsity_m=4,
        weight_sparsity_start_step=2,
        weight_sparsity_update_step=3,
    )
    update = jax.jit(lambda state, w: sparsity.update_state(state, w, rule))
    weights = [normal(seed, 2, 8) for seed in range(7)]
    state, masks = sparsity.init_state((2, 8)), []
    for w in weights:
        state = update(state, w)
        masks.append(np.asarray(state["mask"]))
    fresh = [np.asarray(sparsity.get_sparsity_mask(w, 1, 4)) for w in weights]
    everything = np.ones((2, 8), bool)
    expected = [everything, everything, fresh[2], fresh[2], fresh[2], fresh[5], fresh[5]]
    np.testing.assert_array_equal(masks, expected)
    assert int(state["step"]) == 7 and (fresh[2] != fresh[5]).any()
    frozen = sparsity.update_state(state, weights[0], qwix.SparsityRule(**vars(rule) | {"eval_mode": True}))
    np.testing.assert_array_equal(frozen["mask"], masks[-1])
    assert int(frozen["step"]) == 7


def test_the_default_rule_keeps_its_state_as_it_is(normal):
    state = sparsity.update_state(sparsity.init_state((3,)), normal(0, 3), qwix.SparsityRule())
    assert bool(state["mask"].all())
    with pytest.raises(ValueError, match="update step 1"):
        sparsity.update_state(state, normal(0, 3), qwix.SparsityRule(weight_sparsity_update_step=0))


def test_activations_have_a_pattern_of_their_own():
    rule = qwix.SparsityRule(activation_sparsity_n=1, activation_sparsity_m=2)
    x = jnp.array([[1.0, -2.0, 3.0, 0.5]])
    np.testing.assert_array_equal(qarray.sparsify(x, rule), x)
    np.testing.assert_array_equal(qarray.sparsify(x, rule, "activation"), [[0.0, -2.0, 3.0, 0.0]])
