from __future__ import annotations
from qwix_kernels.matmul.tpu_plan import *
from qwix_kernels.dispatch import Estimate
def check(problem, chip): pass
def estimate(problem, chip, config): return Estimate(1,1,1,1)
def heuristic_config(problem, chip):
    p=problem; t=[x for x in (k_tile(p.lhs,p.k),k_tile(p.rhs,p.k),p.quantize_lhs.tile_k%p.k if p.quantize_lhs else 0) if x]
    return Config(min(1024,pl_cdiv(p.m,8)*8 if p.m<=32 else pl_cdiv(p.m,32)*32), min(256,p.n) , p.k, ("after" if min(t)>=128 and p.m<=64 else "before") if t else "once")
