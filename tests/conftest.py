"""Every test runs with the shapes and types of bayesrl's annotations checked."""

import gc
import os
import signal
from pathlib import Path

# A shell lets what runs in its background ignore interrupts; some tests interrupt themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tracing makes many objects, few of which are rubbish: looking for it as often as Python does takes a tenth of the time.
gc.set_threshold(200_000, 20, 100)
# Tests compile many small programs and run each of them briefly.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import checking  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

checking.be_quick()
install_import_hook("bayesrl", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from collections.abc import Iterator  # noqa: E402
from contextlib import suppress  # noqa: E402

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from bayesrl.cache import use_cache  # noqa: E402

# Workers, and the notebooks and commands that they start, share what they compile; the next run finds it.
COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
use_cache(COMPILED)
LONGEST = (
    "tests/test_notebooks.py",
    "tests/models/",
    "tests/lm/",
    "tests/cli/",
    "tests/control/",
    "tests/diagnostics/",
)

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=8)
settings.load_profile("fixed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file on one worker, which so traces once what they share; begin with the longest.

    Notebooks are long and examples of docstrings are short: each runs where there is room.
    """
    for item in items:
        file = item.nodeid.partition("::")[0]
        alone = not file.startswith("tests/") or file in LONGEST
        if not alone and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: _rank(item.nodeid))


def _rank(nodeid: str) -> int:
    if not nodeid.startswith("tests/"):
        return len(LONGEST) + 1
    return next((rank for rank, place in enumerate(LONGEST) if nodeid.startswith(place)), len(LONGEST))


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the models that ready problems train in a folder of this run's own, which all workers share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"
    folder.mkdir(exist_ok=True)
    with suppress(FileExistsError):
        (folder / "compiled").symlink_to(COMPILED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAYESRL_CACHE", str(folder))
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
