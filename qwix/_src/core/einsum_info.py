"""Einsum subscripts: parsing, and what a step of two operands means as a `dot_general`.

`parse` turns every form that `jax.numpy.einsum` takes (string or interleaved, implicit output, ellipsis) into
explicit single letters. `EinsumInfo` is one step of two operands in that form.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Sequence
from typing import Any

from qwix._src.core.transposed_qarray import DotDimensionNumbers

_LETTERS = string.ascii_letters


@dataclasses.dataclass(slots=True)
class EinsumInfo:
    """'lhs,rhs->out' of two operands, one letter per axis and none twice in a term.

    >>> info = EinsumInfo.parse("abc,bcd->acd")
    >>> info.dimension_numbers, info.output_perm
    ((((1,), (0,)), ((2,), (1,))), (1, 0, 2))
    """

    lhs: str
    rhs: str
    out: str

    @classmethod
    def parse(cls, einsum_str: str, ndims: Sequence[int] | None = None) -> EinsumInfo:
        """Reads an einsum string of two operands; `ndims` (their ranks) resolves an ellipsis.

        Raises:
          NotImplementedError: not exactly two operands, or a letter twice in a term.
        """
        text = einsum_str.replace(" ", "")
        if text.split("->")[0].count(",") != 1:
            raise NotImplementedError(f"Expected two operands in {einsum_str!r}.")
        if "..." in text and ndims is not None:
            text = expand_ellipsis(text, ndims)
        if "->" not in text:
            text = f"{text}->{_implicit_output(text)}"
        if not re.fullmatch(r"[a-zA-Z]*,[a-zA-Z]*->[a-zA-Z]*", text):
            raise NotImplementedError(f"Unsupported einsum: {einsum_str!r}.")
        info = cls(*re.split(",|->", text))
        if any(len(set(term)) != len(term) for term in (info.lhs, info.rhs, info.out)):
            raise NotImplementedError(f"A letter stands twice in one term of {einsum_str!r}.")
        return info

    @property
    def batch_chars(self) -> str:
        """Letters of both operands and the output, sorted."""
        return "".join(sorted(set(self.lhs) & set(self.rhs) & set(self.out)))

    @property
    def contract_chars(self) -> str:
        """Letters of both operands that the output lacks, sorted."""
        return "".join(sorted((set(self.lhs) & set(self.rhs)) - set(self.out)))

    @property
    def dimension_numbers(self) -> DotDimensionNumbers:
        contract, batch = self.contract_chars, self.batch_chars
        axes = lambda term, chars: tuple(term.index(c) for c in chars)
        return (
            (axes(self.lhs, contract), axes(self.rhs, contract)),
            (axes(self.lhs, batch), axes(self.rhs, batch)),
        )

    @property
    def dot_chars(self) -> str:
        """Letters of the dot's result: batch, free of lhs, free of rhs."""
        shared = set(self.batch_chars + self.contract_chars)
        return self.batch_chars + "".join(c for c in self.lhs + self.rhs if c not in shared)

    @property
    def output_perm(self) -> tuple[int, ...] | None:
        """How to transpose the dot's result; None where it is right already.

        Raises:
          ValueError: a letter of one operand alone that the output lacks; sum over it first.
        """
        chars = self.dot_chars
        if set(chars) != set(self.out):
            raise ValueError(f"{self.lhs},{self.rhs}->{self.out} reduces an axis of one operand alone.")
        return None if chars == self.out else tuple(chars.index(c) for c in self.out)


def _implicit_output(inputs: str) -> str:
    """Without '->': the ellipsis, then every letter that stands once, in alphabetical order."""
    dots = "..." if "..." in inputs else ""
    letters = [c for c in inputs.replace("...", "") if c.isalpha()]
    return dots + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))


def expand_ellipsis(text: str, ndims: Sequence[int]) -> str:
    """Replaces each '...' by unused letters, aligned at the right.

    >>> expand_ellipsis("...a,ab->...b", (2, 2))
    'ca,ab->cb'
    """
    inputs, arrow, out = text.partition("->")
    if not arrow:
        out = _implicit_output(text)
    terms = inputs.split(",")
    counts = [n - len(t.replace("...", "")) if "..." in t else 0 for t, n in zip(terms, ndims, strict=True)]
    if min(counts, default=0) < 0:
        raise ValueError(f"einsum {text!r} names more axes than the operands of rank {tuple(ndims)} have.")
    free = [c for c in _LETTERS if c not in text][: max(counts, default=0)]
    fill = lambda term, count: term.replace("...", "".join(free[len(free) - count :]))
    filled = ",".join(fill(t, c) for t, c in zip(terms, counts, strict=True))
    return f"{filled}->{fill(out, len(free))}"


def parse(args: Sequence[Any]) -> tuple[list[str], str, list[Any]]:
    """(terms of the operands, output, operands) of `einsum(*args)`, ellipsis and implicit output resolved.

    Raises:
      ValueError: subscripts that don't fit the operands.
    """
    if not args:
        raise ValueError("einsum needs subscripts and operands.")
    text, operands = (args[0], list(args[1:])) if isinstance(args[0], str) else _from_interleaved(args)
    text = text.replace(" ", "")
    if not re.fullmatch(r"([a-zA-Z.]*,)*[a-zA-Z.]*(->[a-zA-Z.]*)?", text):
        raise ValueError(f"Cannot parse einsum {text!r}.")
    if text.split("->")[0].count(",") + 1 != len(operands):
        raise ValueError(f"einsum {text!r} has other operands than the {len(operands)} given.")
    if "." in text.replace("...", ""):
        raise ValueError(f"einsum {text!r}: an ellipsis is three dots.")
    text = expand_ellipsis(text, [x.ndim for x in operands])
    inputs, out = text.split("->")
    terms = inputs.split(",")
    for term, x in zip(terms, operands, strict=True):
        if len(term) != x.ndim:
            raise ValueError(f"einsum {text!r}: {term!r} has {len(term)} letters for shape {x.shape}.")
    if len(set(out)) != len(out) or not set(out) <= set("".join(terms)):
        raise ValueError(f"einsum {text!r}: each output letter must be unique and stand in an input.")
    return terms, out, operands


def _from_interleaved(args: Sequence[Any]) -> tuple[str, list[Any]]:
    """einsum(x, [0, 1], y, [1, 2], [0, 2]) as a string."""
    pairs, rest = args[: len(args) // 2 * 2], args[len(args) // 2 * 2 :]
    term = lambda axes: "".join("..." if a is Ellipsis else _LETTERS[a] for a in axes)
    text = ",".join(term(axes) for axes in pairs[1::2])
    return (f"{text}->{term(rest[0])}" if rest else text), list(pairs[::2])
