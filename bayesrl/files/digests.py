"""Stamps: a line inside a file with its format, its name, the problem that it belongs to and a digest of its bytes.

To compute the digest, put zeros in its place. The stamp is at the beginning or the end of the file, as its kind allows.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

FORMAT = 4
"""Format of the files of a run folder."""

ANYBODY = "0" * 16
"""The problem of files that may belong to any problem."""

_STAMP = re.compile(rb"bayesrl format (\d{1,9}), ([\w.-]{1,40}) of ([0-9a-f]{16}), sha256 ([0-9a-f]{64})")
_NEAR = 200
"""A stamp begins within this many bytes from either end."""

_BLANK = b"0" * 64


OLDEST = 3
"""Since this format, stamps have had today's meaning."""


class UnstampedError(ValueError):
    """A file has no stamp."""


class NewerError(ValueError):
    """A later version wrote the file."""


def blank(name: str, problem: str = ANYBODY) -> str:
    """Return a stamp to put into a file of this name; `stamped` then completes it."""
    return f"bayesrl format {FORMAT}, {name} of {problem}, sha256 {_BLANK.decode()}"


def stamped(content: bytes) -> bytes:
    """Complete the stamp in the content of a file."""
    found = _found(content)
    if found is None:
        raise ValueError("there is no stamp in the content")
    # The digest has as many digits as the zeros in its place, so nothing moves.
    return content[: found.start(4)] + hashlib.sha256(content).hexdigest().encode() + content[found.end(4) :]


def _found(content: bytes) -> re.Match[bytes] | None:
    return _STAMP.search(content, 0, 2 * _NEAR) or _STAMP.search(content, max(len(content) - 2 * _NEAR, 0))


def verify(content: bytes, name: str, problem: str = ANYBODY) -> None:
    """Check that a file is as it was written, under this name and for this problem.

    Raises:
        NewerError: a later version wrote it.
        ValueError: it is damaged, has no stamp, or is of another name or problem; the message says which.
    """
    found = _found(content)
    if found is None:
        raise UnstampedError("it has no digest of its content")
    if int(found[1]) > FORMAT:
        raise NewerError(newer(int(found[1])))
    if int(found[1]) < OLDEST:
        raise ValueError(f"it has format {int(found[1])}, and this version reads {FORMAT}")
    digest = hashlib.sha256(memoryview(content)[: found.start(4)])  # a view, since slicing would copy a large file
    digest.update(_BLANK)
    digest.update(memoryview(content)[found.end(4) :])
    if digest.hexdigest().encode() != found[4]:
        raise ValueError("its content does not agree with its digest")
    if found[2].decode() != name:
        raise ValueError(f"it was written as {found[2].decode()}")
    if ANYBODY not in (own := found[3].decode(), problem) and own != problem:
        raise ValueError("it belongs to another run")


def is_intact(content: bytes, name: str) -> bool:
    """Whether a file agrees with its stamp."""
    try:
        verify(content, name)
    except ValueError:
        return False
    return True


def digest_of(content: bytes) -> str:
    """Return the digest of a file that cannot contain it."""
    return hashlib.sha256(content).hexdigest()


def newer(number: Any) -> str:
    """Describe a file of a later version."""
    return (
        f"it has format {number}, of a newer version of bayesrl, and this one reads {FORMAT}; update bayesrl to read it"
    )


def problem_digest(identity: Mapping[str, Any]) -> str:
    """Return a short digest of a problem's identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:16]


STAMP = "digest"
"""The key of the stamp in JSON and safetensors files."""


def stamped_json(content: Mapping[str, Any], name: str, problem: str = ANYBODY) -> bytes:
    """Write an object as JSON with a stamp at its end."""
    told = {key: value for key, value in content.items() if key != STAMP} | {STAMP: blank(name, problem)}
    try:
        written = json.dumps(told, indent=1, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # lone surrogates, which ASCII escapes can write
        written = json.dumps(told, indent=1).encode()
    return stamped(written + b"\n")
