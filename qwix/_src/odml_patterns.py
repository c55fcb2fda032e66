"""Ops that JAX writes as several: found in the graph, and put in their place."""

from __future__ import annotations

from typing import Any


def rewrite(trace: Any, leaves: list[Any], left: list[Any]) -> tuple[list[Any], list[Any]]:
    return leaves, left
