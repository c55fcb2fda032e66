"""The layers of the project, checked on the source: who may import whom.

    qwix_kernels           jax, numpy and the standard library
    qwix/_src/core         no provider
    qwix/_src/providers    not each other, except the base class they share
    qwix/contrib           public names of qwix, and qwix/_src/core
    examples               public names of qwix
    everything             nothing of bench, tests or examples, except from inside that package and where
                           `EXCEPTIONS` says so

An import counts wherever it stands: inside a function, under TYPE_CHECKING, or by
`importlib.import_module("...")`.
"""

import ast
import pathlib
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = {"qwix": ROOT / "qwix", "qwix_kernels": ROOT / "kernels" / "qwix_kernels"}
SOURCES |= {name: ROOT / name for name in ("bench", "examples")}

KERNEL_IMPORTS = {"jax", "numpy", "qwix_kernels"} | sys.stdlib_module_names
PROVIDERS = "qwix._src.providers"
PROVIDER_BASES = {f"{PROVIDERS}.boxed_param"}
OUTSIDE = ("bench", "tests", "examples")
EXCEPTIONS = {("bench.compile_ratios", "examples.smollm2")}  # it measures that very model


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imports(module: str, is_package: bool, source: str) -> Iterator[str]:
    """Absolute names of what `module` imports; `from a import b` gives `a.b`, since b may be a module."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def broken(module: str, target: str) -> str | None:
    """The layer that `module` breaks by importing `target`, in words."""
    excepted = any(module == who and within(target, whom) for who, whom in EXCEPTIONS)
    for package in OUTSIDE:
        if within(target, package) and not within(module, package) and not excepted:
            return f"nothing outside {package} imports it"
    if within(module, "qwix_kernels") and target.split(".")[0] not in KERNEL_IMPORTS:
        return "kernels import jax, numpy and the standard library"
    if within(module, "qwix._src.core") and within(target, PROVIDERS):
        return "core imports no provider"
    sideways = within(module, PROVIDERS) and within(target, PROVIDERS) and target != PROVIDERS
    if sideways and not any(within(target, base) for base in {*PROVIDER_BASES, module}):
        return "providers meet only in a base class"
    private = within(target, "qwix._src")
    if within(module, "qwix.contrib") and private and not within(target, "qwix._src.core"):
        return "contrib uses public names and _src/core"
    if within(module, "examples") and (private or within(target, "qwix_kernels")):
        return "examples use public names of qwix"
    return None


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    found = []
    for target in imports(module, is_package, source):
        if reason := broken(module, target):
            found.append(f"{module} imports {target}: {reason}")
    return found


def modules() -> Iterator[tuple[str, pathlib.Path]]:
    for name, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_the_layers_hold():
    found = [
        violation
        for module, path in modules()
        for violation in violations(module, path.read_text(), is_package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_every_package_is_read():
    assert {module.split(".")[0] for module, _ in modules()} >= {"qwix", "qwix_kernels", "examples"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qwix_kernels.matmul.api", "import qwix"),
        ("qwix_kernels.matmul.api", "from qwix._src.core import qarray"),
        ("qwix_kernels.matmul.api", "import flax"),
        ("qwix_kernels.matmul.api", "def f():\n    from flax import nnx"),
        ("qwix_kernels.matmul.api", "import importlib\nimportlib.import_module('qwix')"),
        ("qwix._src.core.qarray", "from qwix._src.providers import ptq"),
        ("qwix._src.core.qarray", "from qwix._src.providers.ptq import PtqProvider"),
        ("qwix._src.core.qarray", "from ..providers import ptq"),
        ("qwix._src.providers.lora", "from qwix._src.providers import ptq"),
        ("qwix._src.providers.lora", "from .ptq import PtqProvider"),
        ("qwix.contrib.mine", "from qwix._src.providers import ptq"),
        ("qwix.contrib.mine", "from qwix._src import interception"),
        ("qwix._src.model", "import bench.price"),
        ("qwix_kernels.problem", "from tests import util"),
        ("bench.price", "from examples.smollm2 import model"),
        ("examples.smollm2.model", "from qwix._src.core import qarray"),
        ("examples.smollm2.model", "from qwix_kernels import dispatch"),
    ],
)
def test_a_broken_layer_is_found(module: str, source: str):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "qwix_kernels.matmul.api",
            "import functools\nimport jax.numpy as jnp\nfrom qwix_kernels import problem",
        ),
        ("qwix._src.core.dot_general", "from qwix_kernels import matmul\nfrom qwix._src.core import qarray"),
        ("qwix._src.providers.ptq", "from qwix._src.providers.boxed_param import BoxedParamProvider"),
        (
            "qwix._src.providers.ptq",
            "from qwix._src.providers import boxed_param\nfrom qwix._src import qconfig",
        ),
        ("qwix.contrib.mine", "import qwix\nfrom qwix import pallas\nfrom qwix._src.core import qarray"),
        ("bench.price", "from bench import shapes"),
        ("examples.smollm2.generate", "import qwix\nfrom examples.smollm2 import model"),
    ],
)
def test_allowed_imports_pass(module: str, source: str):
    assert violations(module, source) == []
