"""Set-up shared by all tests: where they run and what hypothesis may do.

Everything here has to happen before JAX picks a backend, so this file does it when it is imported, not in a
fixture: tests run on the CPU, which pretends to be eight devices, and libtpu (for ahead-of-time compiles)
neither asks a metadata server nor minds a second process.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    )

import hypothesis
import jax
import pytest

# A pytest plugin may have imported JAX, and with it read JAX_PLATFORMS, before this file ran.
jax.config.update("jax_platforms", "cpu")

# The first example of a shape compiles, later ones do not, so a time limit per example says nothing; and a
# test that fails must fail again tomorrow.
hypothesis.settings.register_profile(
    "qwix",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("qwix")


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """The eight virtual CPU devices."""
    found = jax.devices()
    if len(found) != 8:
        pytest.fail(
            f"expected 8 virtual CPU devices, got {found}; was JAX initialised before tests/conftest.py?"
        )
    return found
