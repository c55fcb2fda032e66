"""What training leaves on disk is what inference starts from: through orbax, with the same outputs."""

import flax.linen as nn
import jax
import orbax.checkpoint as ocp
from flax import nnx

import qwix

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (8, 16))
RULE = qwix.QtRule(weight_qtype="int8", act_qtype="int8", bwd_qtype="int8", act_static_scale=True)


def through_disk(tree, path):
    """The tree as it is read back."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
        return checkpointer.restore(path, target)


def test_a_linen_checkpoint_of_training_serves_the_same_outputs(tmp_path):
    trained = qwix.quantize_model(nn.Dense(8), qwix.QtProvider(RULE))
    variables = trained.init(KEY, X)
    for scale in (1.0, 2.0):
        _, new = trained.apply(variables, scale * X, mutable=["quant_stats"])
        variables = variables | new
    read = through_disk(variables, tmp_path / "trained")
    served = qwix.quantize_model(nn.Dense(8), qwix.PtqProvider(RULE))
    abstract = jax.eval_shape(served.init, KEY, X)["params"]
    params = qwix.quantize_params(read["params"], abstract, read["quant_stats"])
    assert (served.apply({"params": params}, X) == trained.apply(variables, X)).all()


def test_an_nnx_checkpoint_of_training_goes_on_training_and_serves_the_same_outputs(tmp_path):
    linear = lambda seed: nnx.Linear(16, 8, rngs=nnx.Rngs(seed))
    trained = qwix.quantize_model(linear(0), qwix.QtProvider(RULE), X)
    trained(X), trained(2 * X)
    read = through_disk(nnx.state(trained, (nnx.Param, qwix.QuantStat)), tmp_path / "trained")
    resumed = qwix.quantize_model(linear(1), qwix.QtProvider(RULE), X)
    nnx.update(resumed, read)
    assert (resumed(3 * X) == trained(3 * X)).all()
    assert resumed.dot_general0_lhs.get_value()["count"] == 3
    served = qwix.quantize_model(linear(2), qwix.PtqProvider(RULE), X)
    params, stats = (nnx.to_pure_dict(nnx.state(resumed, kind)) for kind in (nnx.Param, qwix.QuantStat))
    nnx.update(served, qwix.quantize_params(params, served, stats))
    trained.set_attributes(disable_quant_stats_update=True)
    assert (served(X) == trained(X)).all()


def test_a_checkpoint_of_int4_weights_is_read_as_int4(tmp_path):
    model = qwix.quantize_model(nn.Dense(8), qwix.PtqProvider(qwix.QuantizationRule(weight_qtype="int4")))
    abstract = jax.eval_shape(model.init, KEY, X)["params"]
    params = qwix.quantize_params(nn.Dense(8).init(KEY, X)["params"], abstract)
    read = through_disk(params, tmp_path / "int4")
    assert read["kernel"].array.qvalue.dtype == "int4"
    assert (model.apply({"params": read}, X) == model.apply({"params": params}, X)).all()
