"""Only plain files are read or written, damage is named, and a folder has one writer."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from bayesrl.cache import Entries
from bayesrl.errors import RunFolderError
from bayesrl.files import locking, schemas
from bayesrl.files.digests import FORMAT, NewerError, blank, is_intact, stamped, stamped_json, verify
from bayesrl.files.regular_files import file_name, read_file, remove_unfinished, write_file


def lay(kind: str, path: Path, outside: Path) -> None:
    outside.write_bytes(b"theirs")
    match kind:
        case "link":
            path.symlink_to(outside)
        case "link to nothing":
            path.symlink_to(outside.with_name("nothing"))
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()


@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe", "device", "folder"])
def test_what_is_no_plain_file_is_neither_read_nor_written(tmp_path: Path, kind: str) -> None:
    path, outside = tmp_path / "file", tmp_path / "outside"
    lay(kind, path, outside)
    with pytest.raises(RunFolderError, match=r"only plain files are read|it is a"):
        read_file(path)
    with pytest.raises(RunFolderError, match="only plain files are written"):
        write_file(path, b"ours")
    assert outside.read_bytes() == b"theirs"
    assert not (tmp_path / "nothing").exists()
    assert not list(tmp_path.glob(".*")), "no litter"


def test_a_file_is_read_within_its_bound(tmp_path: Path) -> None:
    assert read_file(tmp_path / "none") is None
    write_file(tmp_path / "file", b"12345")
    assert read_file(tmp_path / "file", most=5) == b"12345"
    with pytest.raises(RunFolderError, match="5 bytes, over the 4"):
        read_file(tmp_path / "file", most=4)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(RunFolderError, match="it is damaged or belongs to something else"):
        read_file(tmp_path / "sparse")


def test_a_name_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    for use in (read_file, lambda path: write_file(path, b"")):
        with pytest.raises(RunFolderError, match="name another file"):
            use(tmp_path / "a\0b")


@pytest.mark.parametrize("text", ["../../x", "/etc/passwd", "..", "a/../../b", "a\\..\\b", "a\0b", "", "x" * 500, "\n"])
def test_names_stay_in_their_folder(tmp_path: Path, text: str) -> None:
    path = tmp_path / file_name(text)
    assert path.resolve().parent == tmp_path.resolve()
    assert path != tmp_path
    write_file(path, b"x")


@pytest.mark.parametrize("key", ["jit-../../x", "../x-../../y", "a/b-c/d"])
def test_keys_of_the_cache_stay_in_their_folder(tmp_path: Path, key: str) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    entries = Entries(folder, 1000)
    entries.put(key, b"program")
    assert entries.get(key) == b"program"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_was_there_before_is_kept_aside(tmp_path: Path) -> None:
    path, before = tmp_path / "file", tmp_path / "before"
    for content in (b"1", b"2", b"3"):
        write_file(path, content, before=before)
    assert (path.read_bytes(), before.read_bytes()) == (b"3", b"2")
    (tmp_path / ".file.00aa.writing").write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["before", "file"]


# ---- stamps -----------------------------------------------------------------------------------

STAMPED = {
    "json": stamped_json({"a": [1, 2.5, None], "β": "x"}, "name"),
    "tail": stamped(b"content" * 90 + blank("name").encode()),
    "head": stamped(blank("name").encode() + bytes(2000)),
}


@pytest.mark.parametrize("kind", STAMPED)
def test_every_changed_byte_is_seen(kind: str) -> None:
    content = STAMPED[kind]
    verify(content, "name")
    for at in range(0, len(content), 1 + len(content) // 400):
        for changed in (content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :], content[:at]):
            assert not is_intact(changed, "name"), at
    assert not is_intact(content + b"\0", "name")
    with pytest.raises(ValueError, match="it was written as name"):
        verify(content, "other")


def test_files_of_other_runs_and_newer_versions_are_told_as_such() -> None:
    content = stamped_json({}, "name", "a" * 16)
    verify(content, "name", "a" * 16)
    with pytest.raises(ValueError, match="belongs to another run"):
        verify(content, "name", "b" * 16)
    with pytest.raises(NewerError, match=r"newer version of bayesrl.*update bayesrl"):
        verify(content.replace(f"format {FORMAT}".encode(), f"format {FORMAT + 1}".encode()), "name")


# ---- JSON -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[" * 100_000, "nested over"),
        (b'{"a":' * 10_000, "nested over"),
        (b"{", "Expecting"),
        (b"", "Expecting"),
        (b"\xff\xfe", "decode"),
        (b"1" * 10_000, "integer string conversion"),
    ],
)
def test_json_has_bounds(content: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        schemas.parsed(content)


def test_brackets_in_texts_are_no_depth() -> None:
    text = '["\\"' * 200
    assert schemas.parsed(json.dumps({"a": text}).encode()) == {"a": text}


SCHEMA = {
    "steps": schemas.integer_between(1, 10),
    "beta": (schemas.NOTHING, [schemas.POSITIVE], schemas.POSITIVE),
    "rows": [{"name": schemas.TEXT, "*": schemas.NUMBER}],
    "more?": schemas.FLAG,
}
FINE: dict[str, Any] = {"steps": 3, "beta": [0.5, 1], "rows": [{"name": "x", "se": 0.5}]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": True}, "steps is True, not an integer from 1 to 10"),
        ({"steps": 3.0}, "steps is 3.0"),
        ({"steps": 11}, "steps is 11"),
        ({"beta": [0.5, -1]}, "beta is"),
        ({"beta": float("nan")}, "beta is nan, not a positive number"),
        ({"rows": {}}, "rows is {}, not a list"),
        ({"rows": [{"name": 1}]}, r"rows\[0\].name is 1, not text"),
        ({"rows": [{"name": "x", "se": "y"}]}, r"rows\[0\].'se' is 'y', not a number"),
        ({"more": 1}, "more is 1, not true or false"),
    ],
)
def test_what_does_not_fit_is_told_with_its_place(change: dict[str, Any], told: str) -> None:
    assert schemas.misfit(FINE, SCHEMA) is None
    found = schemas.misfit(FINE | change, SCHEMA)
    assert found is not None
    assert re.search(told, found), found


def test_what_is_missing_is_told() -> None:
    assert schemas.misfit({}, SCHEMA) == "it has no 'steps'"
    assert schemas.misfit([], SCHEMA) == "it is [], not an object"


# ---- one writer -------------------------------------------------------------------------------


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with locking.lock_folder(tmp_path), locking.lock_folder(tmp_path):  # whoever holds it may hold it again
        found: list[str] = []

        def other() -> None:
            try:
                with locking.lock_folder(tmp_path):
                    found.append("held")
            except RunFolderError as error:
                found.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert f"is in use by process {os.getpid()} on " in found[0]
    assert not list(tmp_path.iterdir())
    with locking.lock_folder(tmp_path):
        pass


def test_a_process_that_is_killed_leaves_its_folder_free(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from bayesrl.files.locking import lock_folder\n"
        f"with lock_folder(pathlib.Path({str(tmp_path)!r})):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match=f"in use by process {process.pid}"), locking.lock_folder(tmp_path):
            pass
        process.kill()
        process.wait()
    with locking.lock_folder(tmp_path):
        assert (tmp_path / locking.LOCK).exists()


@pytest.mark.parametrize("kind", ["link", "pipe", "device", "folder"])
def test_a_lock_that_somebody_laid_is_refused(tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    (tmp_path / "run").mkdir()
    lay(kind, tmp_path / "run" / locking.LOCK, outside)
    with pytest.raises(RunFolderError, match="only plain files are written"), locking.lock_folder(tmp_path / "run"):
        pass
    assert outside.read_bytes() == b"theirs"
