"""Times the PyPI package qwix, google's, in an interpreter of its own. cpu_ratios.py starts it.

    PYTHON -I bench/reference_child.py

It imports nothing of this project, whose package has the same name: `-I` keeps both the current folder and
PYTHONPATH out. It reads one JSON object a line and answers with one:

    {"make": NAME, "weight": "int8", "activation": "int8" or null, "tile": 128 or 0, "dtype": "float32",
     "m": .., "k": .., "n": ..}   -> {"made": NAME}: compiled and run once
    {"run": NAME}                 -> {"seconds": ..} of the second of two runs

Quantizing the activations is part of the run, quantizing the weight is not, as in our own programs.
"""

import importlib.metadata
import json
import sys
import time


def program(qwix, jax, np, request):
    """(jitted function, its arguments) of a request to make one."""
    rng = np.random.default_rng(0)
    m, k, n, tile = (request[key] for key in ("m", "k", "n", "tile"))
    dtype, activation = request["dtype"], request["activation"]
    x = jax.numpy.asarray(rng.normal(size=(m, k)), dtype)
    w = jax.numpy.asarray(rng.normal(size=(k, n)), dtype)
    weight = qwix.quantize(w, request["weight"], channelwise_axes=(1,), tiled_axes={0: tile} if tile else {})

    def run(x, weight):
        if activation:
            tiles = {1: tile} if tile else {}
            x = qwix.quantize(x, activation, channelwise_axes=(0,), tiled_axes=tiles)
        return qwix.dot_general(x, weight, (((1,), (0,)), ((), ())))

    return jax.jit(run), (x, weight)


def main():
    try:
        import jax
        import numpy as np

        import qwix

        version = importlib.metadata.version("qwix")
    except ImportError as error:
        print(json.dumps({"error": f"{error}"}), flush=True)
        return
    hello = {"version": version, "file": qwix.__file__, "jax": jax.__version__}
    print(json.dumps(hello), flush=True)
    programs = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "make" in request:
            fn, arguments = programs[request["make"]] = program(qwix, jax, np, request)
            jax.block_until_ready(fn(*arguments))
            answer = {"made": request["make"]}
        else:
            fn, arguments = programs[request["run"]]
            jax.block_until_ready(fn(*arguments))
            start = time.perf_counter()
            jax.block_until_ready(fn(*arguments))
            answer = {"seconds": time.perf_counter() - start}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
