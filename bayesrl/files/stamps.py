"""Stamps: the format of a file, the problem that it belongs to and a digest of every byte of it, inside of the file.

The digest is taken with zeros in its own place; it stands at the beginning of a file or at its end, as its kind allows.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

FORMAT = 3
"""Of the files of a run folder."""

ANYBODY = "0" * 16
"""The problem of files that may belong to any."""

_STAMP = re.compile(rb"bayesrl format (\d{1,9}), problem ([0-9a-f]{16}), sha256 ([0-9a-f]{64})")
_NEAR = 200
"""So many bytes from either end a stamp begins at the latest."""

_BLANK = b"0" * 64


class NewerError(ValueError):
    """A file was written by a later version."""


def blank(problem: str = ANYBODY) -> str:
    """Give a stamp to be put into a file that `stamped` then completes."""
    return f"bayesrl format {FORMAT}, problem {problem}, sha256 {_BLANK.decode()}"


def stamped(content: bytes) -> bytes:
    """Complete the stamp in the content of a file."""
    found = _found(content)
    if found is None:
        raise ValueError("there is no stamp in the content")
    return content[: found.start(3)] + hashlib.sha256(content).hexdigest().encode() + content[found.end(3) :]


def _found(content: bytes) -> re.Match[bytes] | None:
    return _STAMP.search(content, 0, 2 * _NEAR) or _STAMP.search(content, max(len(content) - 2 * _NEAR, 0))


def checked(content: bytes, problem: str = ANYBODY) -> str:
    """See that a file is as it was written, and give the problem that it belongs to.

    Args:
        content: of the file.
        problem: that it has to belong to.

    Raises:
        NewerError: a later version wrote it.
        ValueError: it is damaged, bears no stamp or belongs to another problem; the message says which.
    """
    found = _found(content)
    if found is None:
        raise ValueError("it bears no digest of its content")
    if int(found[1]) > FORMAT:
        raise NewerError(newer(int(found[1])))
    if int(found[1]) < FORMAT:
        raise ValueError(f"it has format {int(found[1])}, and this version reads {FORMAT}")
    digest = hashlib.sha256(memoryview(content)[: found.start(3)])
    digest.update(_BLANK)
    digest.update(memoryview(content)[found.end(3) :])
    if digest.hexdigest().encode() != found[3]:
        raise ValueError("its content does not agree with its digest")
    own = found[2].decode()
    if ANYBODY not in (own, problem) and own != problem:
        raise ValueError("it belongs to another run")
    return own


def is_whole(content: bytes) -> bool:
    """Whether a file is as its stamp says."""
    try:
        checked(content)
    except ValueError:
        return False
    return True


def digest_of(content: bytes) -> str:
    """Give the digest of a file that cannot bear it itself."""
    return hashlib.sha256(content).hexdigest()


def newer(number: Any) -> str:
    """Say that a file is of a later version."""
    return (
        f"it has format {number}, of a newer version of bayesrl, and this one reads {FORMAT}; update bayesrl to read it"
    )


def problem_digest(identity: Mapping[str, Any]) -> str:
    """Give a short digest of what identifies a problem."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:16]


STAMP = "digest"
"""The key of the stamp in JSON and safetensors files."""


def stamped_json(content: Mapping[str, Any], problem: str = ANYBODY) -> bytes:
    """Write an object as JSON with a stamp at its end."""
    told = {name: value for name, value in content.items() if name != STAMP} | {STAMP: blank(problem)}
    try:
        written = json.dumps(told, indent=1, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # halves of characters
        written = json.dumps(told, indent=1).encode()
    return stamped(written + b"\n")
