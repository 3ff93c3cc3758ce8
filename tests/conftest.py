"""Strict numerics for the whole suite; must run before jax is imported."""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Compiled once for all workers and for the processes that tests start; and not kept
    # in the home of whoever runs the tests.
    programs = tempfile.mkdtemp(prefix="geomjax-tests-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every shape and dtype in a signature of geomjax is checked at run time in the tests.
_hook = install_import_hook("geomjax", "beartype.beartype")
_hook.__enter__()


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module():
    """Lets go of a module's programs at its end; a worker would grow to gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def sandbox():
    """Skips where the kernel grants no isolation: the sandbox then refuses to run.

    That it refuses is tested everywhere, in tests/sandbox/test_sandbox_run.py.
    """
    from geomjax.sandbox.run import SandboxUnavailable, require_sandbox

    try:
        require_sandbox()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
