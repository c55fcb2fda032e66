"""Quantized all-gather, reduce-scatter and all-reduce inside `jax.shard_map`; see docs/sharding.md.

int8, int4 or fp8 on the wire, a float32 scale per block, float32 sums, gradients straight through; error
feedback and stochastic rounding for training.
"""

from qwix._src.collectives import all_gather, all_reduce, reduce_scatter
from qwix._src.collectives_feedback import ErrorFeedback, init_error_feedback

__all__ = ["ErrorFeedback", "all_gather", "all_reduce", "init_error_feedback", "reduce_scatter"]
