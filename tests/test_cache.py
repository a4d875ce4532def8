"""The cache of compiled programs: what is kept, whose wishes win, and that nothing that goes wrong stops the work."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import compilations
from jax.experimental.compilation_cache import compilation_cache

from bayesrl import cache
from bayesrl.cache import CacheWarning, Entries, cache_folder, cache_info, clear, compiled_folder, use_by_default
from bayesrl.errors import CacheError

KEY, OTHER, THIRD = ("jit_f-" + 64 * digit for digit in "012")
OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_persistent_cache_enable_xla_caches",
)
WORK = """
import json, sys, warnings
import jax, jax.numpy as jnp, jax.monitoring
from bayesrl.cache import use_by_default, use_cache
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    use_by_default()
    results = [float(jax.jit(lambda x, n=n: jnp.sin(x) * n)(2.0)) for n in range(8)]
print(json.dumps({"hits": len(hits), "results": results, "told": [str(w.message) for w in caught]}))
"""


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Leave JAX as it was."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    used = cache._Used.folder, cache._Used.max_bytes
    cache._told.clear()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    cache._Used.folder, cache._Used.max_bytes = used
    compilation_cache.reset_cache()


@pytest.fixture
def off() -> None:
    """Start with JAX's own settings, as in a fresh process."""
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    compilation_cache.reset_cache()


def put_two(entries: Entries, value: bytes) -> None:
    for key in (OTHER, THIRD):
        entries.put(key, value)


def compile_anew(factor: float) -> float:
    """Compile what this process knows nothing of, for each function is another to JAX."""
    with compilations() as names:
        found = float(jax.jit(lambda x: x * factor + 1)(2.0))
    assert names == ["<lambda>"]
    return found


def run(folder: Path, **environment: str) -> subprocess.Popen[str]:
    told = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "BAYESRL_"))}
    return subprocess.Popen(
        [sys.executable, "-c", WORK],
        env=told | {"BAYESRL_CACHE": str(folder)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told_by(process: subprocess.Popen[str]) -> dict[str, object]:
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")
    told: dict[str, object] = json.loads(out)
    return told


# ---- the folder -------------------------------------------------------------------------------


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BAYESRL_CACHE", str(tmp_path / "own"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert (cache_folder(), compiled_folder()) == (tmp_path / "own", tmp_path / "own" / "compiled")
    monkeypatch.delenv("BAYESRL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "bayesrl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    for platform, place in (("linux", ".cache"), ("darwin", "Library/Caches")):
        monkeypatch.setattr(sys, "platform", platform)
        assert cache_folder() == Path.home() / place / "bayesrl"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert cache_folder() == tmp_path / "bayesrl"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    assert compiled_folder() == tmp_path / "jax"


# ---- entries ----------------------------------------------------------------------------------


def test_entries_are_read_back_and_replaced(tmp_path: Path) -> None:
    entries = Entries(tmp_path, 1000)
    assert entries.get(KEY) is None
    entries.put(KEY, b"a program")
    entries.put(OTHER, b"another")
    assert (entries.get(KEY), entries.get(OTHER)) == (b"a program", b"another")
    entries.put(KEY, b"a newer one")
    assert Entries(tmp_path, 1000).get(KEY) == b"a newer one"
    assert cache_info(tmp_path).entries == 2
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a" * 300, "jit_<lambda>/x", "é " * 40])
def test_any_name_is_a_file(name: str, tmp_path: Path) -> None:
    entries = Entries(tmp_path, 1000)
    entries.put(f"{name}-{64 * 'a'}", b"x")
    assert entries.get(f"{name}-{64 * 'a'}") == b"x"


@pytest.mark.parametrize("damage", [b"", b"bayesrl1", b"junk" * 10, None])
def test_a_damaged_entry_is_told_once_and_replaced(damage: bytes | None, tmp_path: Path) -> None:
    entries = Entries(tmp_path, 1000)
    for key in (KEY, OTHER):
        entries.put(key, b"a program")
        path = entries._file(key)
        path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    with pytest.warns(CacheWarning, match=r"is damaged, and is compiled anew") as told:
        assert (entries.get(KEY), entries.get(OTHER)) == (None, None)
    assert len(told) == 1
    assert str(tmp_path) in str(told[0].message)
    assert "bayesrl cache --clear" in str(told[0].message)
    entries.put(KEY, b"a program")
    assert entries.get(KEY) == b"a program"


def test_what_was_used_last_stays(tmp_path: Path) -> None:
    entries = Entries(tmp_path, 120)
    for age, key in enumerate((KEY, OTHER)):
        entries.put(key, b"x" * 30)
        os.utime(entries._file(key), (age, age))
    assert entries.get(KEY)
    entries.put(THIRD, b"x" * 30)
    assert (entries.get(KEY), entries.get(OTHER), entries.get(THIRD)) == (b"x" * 30, None, b"x" * 30)
    assert Entries(tmp_path, 60).get(THIRD) is not None, "a folder over its limit is emptied at the start"
    assert cache_info(tmp_path).size <= 60


def test_what_killed_processes_left_goes(tmp_path: Path) -> None:
    old, new = tmp_path / ".writing-old", tmp_path / ".writing-new"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    Entries(tmp_path, 100)
    assert (old.exists(), new.exists()) == (False, True)


def test_a_full_disk_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = Entries(tmp_path, 1000)
    entries.put(KEY, b"kept")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(CacheWarning, match="No space left on device") as told:
        put_two(entries, b"x")
    assert len(told) == 1
    assert all(text in str(told[0].message) for text in (str(tmp_path), "use_cache(directory)", "BAYESRL_CACHE"))
    assert entries.get(KEY) == b"kept", "what is there is read all the same"
    assert [path.name for path in tmp_path.iterdir()] == [entries._file(KEY).name]


def test_a_program_over_the_limit_is_told_once(tmp_path: Path) -> None:
    entries = Entries(tmp_path, 20)
    with pytest.warns(CacheWarning, match=r"too large .*use_cache\(max_bytes") as told:
        put_two(entries, b"x" * 100)
    assert len(told) == 1


def test_a_folder_that_became_a_file_is_told_once(tmp_path: Path) -> None:
    folder = tmp_path / "compiled"
    folder.mkdir()
    entries = Entries(folder, 1000)
    folder.rmdir()
    folder.write_text("mine")
    with pytest.warns(CacheWarning, match="cannot be") as told:
        put_two(entries, b"x")
    assert len(told) == 1
    assert entries.get(KEY) is None
    assert folder.read_text() == "mine"


def test_clear_deletes_nothing_else(tmp_path: Path) -> None:
    entries = Entries(tmp_path, 1000)
    entries.put(KEY, b"a program")
    for name in ("mine.txt", "notes-cache", f"jit_g-{64 * 'b'}-cache", f"jit_g-{64 * 'b'}-atime", "x.compiled"):
        (tmp_path / name).write_text("abc")
    (tmp_path / "sub").mkdir()
    assert cache_info(tmp_path).entries == 2
    assert clear(tmp_path).entries == 2
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "notes-cache", "x.compiled", "sub"}
    assert cache_info(tmp_path) == cache_info(tmp_path / "nowhere") == (0, 0)


# ---- JAX --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("off")
def test_what_is_compiled_is_kept(tmp_path: Path) -> None:
    folder = cache.use_cache(tmp_path / "new" / "folder", max_bytes=10**6)
    assert folder == tmp_path / "new" / "folder"
    assert compile_anew(3.25) == 7.5
    kept = cache_info(folder)
    assert kept.entries > 0
    assert compile_anew(3.25) == 7.5
    assert cache_info(folder) == kept
    other = cache.use_cache(tmp_path / "other")
    assert other is not None
    assert compile_anew(4.25) == 9.5
    assert cache_info(other).entries > 0
    assert cache_info(folder) == kept, "another folder takes the place of the first"


@pytest.mark.parametrize("max_bytes", [0, -1, 1.5, True, None])
def test_a_limit_is_a_whole_number(max_bytes: object) -> None:
    with pytest.raises(CacheError if not isinstance(max_bytes, float | None) else Exception, match="max_bytes"):
        cache.use_cache(max_bytes=max_bytes)  # type: ignore[arg-type]


@pytest.mark.usefixtures("off")
def test_the_users_settings_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 5.0)
    use_by_default()
    assert cache.use_cache() == tmp_path / "theirs"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    use_by_default()
    assert cache.use_cache() is None
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_enable_compilation_cache", True)
    assert cache.use_cache(tmp_path / "ours") == tmp_path / "ours"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 5.0
    use_by_default()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ours"), "what was said before stays"
    monkeypatch.setenv("BAYESRL_CACHE", str(tmp_path / "default"))
    assert cache.use_cache() == tmp_path / "default" / "compiled"


@pytest.mark.usefixtures("off")
def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.warns(CacheWarning, match=r"cannot be kept in .*file.*use_cache\(directory\)") as told:
        found = [cache.use_cache(tmp_path / "file") for _ in range(2)]
    assert len(told) == 1
    assert found == [None, None]
    assert compile_anew(5.25) == 11.5


@pytest.mark.usefixtures("off")
def test_programs_that_call_python_are_kept_and_call_what_they_are_given(tmp_path: Path) -> None:
    cache.use_cache(tmp_path)

    def call(factor: float) -> float:
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        with compilations() as names:
            found = jax.jit(lambda x: jax.pure_callback(lambda x: np.float32(factor) * np.asarray(x), shape, x) + 1)(
                2.0
            )
        assert names == ["<lambda>"]
        return float(found)

    assert call(3.0) == 7.0
    kept = cache_info(tmp_path)
    assert call(4.0) == 9.0, "the entry does not hold the function"
    assert cache_info(tmp_path) == kept


def test_two_processes_at_once_and_damage_in_between(tmp_path: Path) -> None:
    first = [run(tmp_path) for _ in range(2)]
    told = [told_by(process) for process in first]
    assert told[0]["results"] == told[1]["results"]
    assert [one["told"] for one in told] == [[], []]
    folder = tmp_path / "compiled"
    kept = cache_info(folder).entries
    again = told_by(run(tmp_path))
    assert again["hits"] == kept
    for path in folder.iterdir():
        path.write_bytes(os.urandom(path.stat().st_size // 2))
    damaged = told_by(run(tmp_path))
    assert (damaged["hits"], damaged["results"], len(damaged["told"])) == (0, again["results"], 1)  # type: ignore[arg-type]
    assert told_by(run(tmp_path)) == again, "what was damaged has been replaced"


IN_A_SCAN = """
import jax, numpyro, numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from bayesrl.core.trace import trace_program
from bayesrl.core.rng import FoldedKeys
def policy():
    def step(x, _):
        y = numpyro.sample("y", dist.Normal(x, 1.0 + x**2).mask(x > 0))
        return x + numpyro.sample("z", dist.StudentT(3.0 + y**2, x, 1.0)), None
    scan(step, 0.5, None, length=3)
print(jax.make_jaxpr(lambda key: trace_program(FoldedKeys(policy, key)).sites["z"].value)(jax.random.key(0)))
"""


def test_another_process_traces_the_same_program(tmp_path: Path) -> None:
    """Python orders sets in another way in each process, and nothing that is compiled may depend on it."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", IN_A_SCAN],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in "012"
    ]
    traced = [process.communicate(timeout=240)[0] for process in processes]
    assert "scan" in traced[0]
    assert traced[0] == traced[1] == traced[2]


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    told = told_by(run(tmp_path / "file"))
    assert len(told["told"]) == 1  # type: ignore[arg-type]
    assert str(tmp_path / "file") in told["told"][0]  # type: ignore[index]
    assert len(told["results"]) == 8  # type: ignore[arg-type]
    off = told_by(run(tmp_path / "off", JAX_ENABLE_COMPILATION_CACHE="0"))
    assert (off["hits"], off["told"], (tmp_path / "off").exists()) == (0, [], False)


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_may_only_be_read(tmp_path: Path) -> None:
    told_by(run(tmp_path))
    (tmp_path / "compiled").chmod(0o500)
    told = told_by(run(tmp_path))
    assert (told["hits"], told["told"]) == (cache_info(tmp_path / "compiled").entries, [])


@pytest.mark.usefixtures("off")
def test_ready_models_and_notebooks_switch_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bayesrl

    monkeypatch.setenv("BAYESRL_CACHE", str(tmp_path))
    cache.use_in_notebooks()
    assert jax.config.jax_compilation_cache_dir is None, "this is no notebook"
    bayesrl.load_problem("bernoulli_bandit")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(cache, "in_notebook", lambda: True)
    cache.use_in_notebooks()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
