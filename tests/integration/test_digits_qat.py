"""The digits example: its data, a short training of each kind, and what its check finds."""

import dataclasses
import doctest

import numpy as np
import pytest
from flax import nnx

from examples.digits_qat import __main__ as program
from examples.digits_qat import data, train
from examples.digits_qat.models import Classifier
from examples.digits_qat.schemes import SCHEMES


@pytest.fixture(scope="module")
def images():
    return data.load()


def test_docstring_examples():
    found = doctest.testmod(data)
    assert found.attempted and not found.failed


def test_the_split_keeps_the_shares_of_the_digits_and_shares_no_image(images):
    shares = [np.bincount(part.labels) / len(part) for part in images]
    assert abs(shares[0] - shares[1]).max() < 0.01
    rows = [np.asarray(part.pixels).reshape(len(part), -1) for part in images]
    assert not {r.tobytes() for r in rows[0]} & {r.tobytes() for r in rows[1]}


def test_an_epoch_has_every_image_once(images):
    batches = list(images[0].batches(train.BATCH, 1, seed=0))
    assert sum(map(len, batches)) == len(images[0])
    seen = np.concatenate([np.asarray(b.pixels).reshape(len(b), -1) for b in batches])
    assert len(np.unique(seen, axis=0)) == len(
        np.unique(np.asarray(images[0].pixels).reshape(len(seen), -1), axis=0)
    )


@pytest.mark.parametrize("name", ["qat_w4a8", pytest.param("qt_int8", marks=pytest.mark.large)])
def test_training_learns_and_serves_what_it_learnt(images, name):
    scheme = SCHEMES[name]
    few = data.Images(images[0].pixels[: 4 * train.BATCH], images[0].labels[: 4 * train.BATCH])
    model = train.prepared(Classifier(nnx.Rngs(0)), scheme.provider(), few)
    losses = train.train(model, few, epochs=6, seed=0, name=name, progress=False)
    assert losses[-1] < 0.7 * losses[0]
    served = train.quantized(model, program.serving_rule(scheme), few)
    assert train.accuracy(served, images[1]) == train.accuracy(model, images[1])


def test_shortfalls_are_named():
    base = program.Result(98.0, None, None, 25.0, {}, 1.0)
    good = dataclasses.replace(base, ptq_accuracy=98.0, float_ptq_accuracy=97.0)
    results = {"float": base, **dict.fromkeys(list(SCHEMES)[1:], good)}
    assert program.shortfalls(results) == []
    bad = program.Result(96.0, 95.0, 97.5, 26.0, {}, 1.0)
    lines = "\n".join(program.shortfalls({**results, "qat_w4a8": bad}))
    assert lines.count("qat_w4a8") == 4
    for part in ("96.00 is more than 1.5 points", "26.000 is more than 3.0 %", "is 95.00", "model 97.50"):
        assert part in lines
