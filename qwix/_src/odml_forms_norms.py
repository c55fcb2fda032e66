"""What is computed in place of normalization: its tensors are int16. See odml_forms.py.

A variance of int8 would have a step of a 255th of the largest one, and its inverse root no digits. LiteRT's
int16 has 32767 steps, and its kernels take no zero points.

Invariant: a variance is the mean square of what is left without the mean. Of mean squares less squared means
nothing is left in int16.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from qwix._src.odml_forms import Compute, Inner, Params


def norm(inner: Inner, compute: Compute, params: Params, x: Any) -> list[Any]:
    """Divides by the root; a multiplication by an inverse root is coarser in int16.

    params: stats_shape, axes, epsilon, centered, total, scale, bias and shape, as odml_norms.py finds them.
    """
    wide = lambda name, x, **options: inner(name, x, qtype="int16", **options)
    number = lambda value: inner.constant(value, "int16")
    part, axes = jnp.reshape(inner.widened("input", x), params["stats_shape"]), params["axes"]
    if params["centered"]:
        part = wide("centered", part - wide("mean", jnp.mean(part, axes, keepdims=True)))
    total = jnp.sum if params["total"] else jnp.mean
    power = wide("power", total(wide("square", part * part), axes, keepdims=True))
    if params["epsilon"]:
        power = wide("sum", power - number(jnp.asarray(-params["epsilon"], x.dtype)))
    root = wide("root", jnp.sqrt(power), positive=True)
    out = jnp.reshape(wide("divided", part / root), params["shape"])
    if params["scale"] is not None:
        out = wide("scaled", out * number(params["scale"]).astype(x.dtype))
    if params["bias"] is not None:
        out = out - number(-params["bias"]).astype(x.dtype)
    return [inner.wide("whole", out)]
