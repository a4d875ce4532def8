"""Every test runs with the shapes and types of bayesrl's annotations checked."""

import os
import signal
from pathlib import Path

# A shell lets what runs in its background ignore interrupts; some tests interrupt themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests compile many small programs and run each of them briefly.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import checking  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

checking.be_quick()
install_import_hook("bayesrl", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from bayesrl.cache import use_cache  # noqa: E402

# Workers share what they compile, and the next run finds it.
use_cache(Path(__file__).parents[1] / ".pytest_cache" / "compiled")

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=8)
settings.load_profile("fixed")


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the models that ready problems train in a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAYESRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(20)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turn the checks of annotations off, to see the errors that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
