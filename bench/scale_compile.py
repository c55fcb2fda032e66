"""Compiles the cells over a mesh, on virtual CPU devices or for TPUs that are not attached. Static.

A TPU's programs are those of the explicit-mesh and shard_map routes: the compiler's client for devices that
are not attached does not ask back how to cut an op, so automatic sharding shows on virtual devices only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from bench import scale_cells, scale_hlo
from bench.scale_cells import Cell

MESHES = {"2x4": (2, 4), "4x2": (4, 2), "8x1": (8, 1)}
TOPOLOGIES = {"v5e:4x4": (4, 4), "v6e:4x4": (4, 4), "tpu7x:2x2x2": (4, 4)}
KERNEL = 'custom_call_target="tpu_custom_call"'


@functools.cache
def _devices(name: str) -> Sequence[Any]:
    if name in MESHES:
        return jax.devices()
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def mesh_of(name: str, kind: AxisType) -> Mesh:
    """A mesh with axes x and y: of MESHES over the virtual devices, of TOPOLOGIES over a whole slice.

    Raises ValueError where there are too few devices.
    """
    shape = (MESHES | TOPOLOGIES)[name]
    devices = _devices(name)
    needed = int(np.prod(shape))
    if len(devices) < needed:
        raise ValueError(
            f"Mesh {name} needs {needed} devices, and there are {len(devices)}. Set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed} before jax is imported."
        )
    return Mesh(np.array(devices[:needed]).reshape(shape), ("x", "y"), axis_types=(kind,) * 2)


def compiled(name: str, cell: Cell) -> str:
    """The text of a cell's program over this mesh."""
    mesh = mesh_of(name, AxisType.Explicit if cell.explicit else AxisType.Auto)
    arguments = [scale_cells.placed(mesh, operand) for operand in cell.operands]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(cell.fn).lower(*arguments).compile().as_text() or ""


def row(name: str, cell: Cell) -> dict[str, Any]:
    """What a cell's program sends, beside what it must."""
    text = compiled(name, cell)
    found = scale_hlo.collectives(text)
    sent = scale_hlo.wire_bytes(found)
    kernels = text.count(KERNEL)
    counts = scale_hlo.counted(found)
    # A compiler may make an all-reduce of a reduce-scatter and the reverse, never more bytes.
    failed = []
    if sent > cell.must_bytes:
        failed.append(f"{sent} bytes on the wire where {cell.must_bytes} must be")
    if name in TOPOLOGIES and cell.kernel and not kernels:
        failed.append("no kernel in its shards")
    return {
        "mesh": name,
        "op": cell.name,
        "devices": int(np.prod((MESHES | TOPOLOGIES)[name])),
        "route": "explicit mesh" if cell.explicit else "shard_map",
        "collectives": scale_hlo.said(found),
        "counts": counts,
        "bytes": sent,
        "must_bytes": cell.must_bytes,
        "kernels": kernels if name in TOPOLOGIES else None,
        "failed": failed,
    }


def rows(names: Sequence[str], only: str = "") -> Iterator[dict[str, Any]]:
    """Of all cells whose name holds `only`."""
    for name in names:
        for cell in scale_cells.cells(*(MESHES | TOPOLOGIES)[name]):
            if only in cell.name:
                yield row(name, cell)
