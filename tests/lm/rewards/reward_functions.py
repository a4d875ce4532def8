"""Functions that worker processes can import, and quickly: nothing but the standard library."""

import os
import re
import signal
import subprocess
import sys
import time


def length(text: str) -> int:
    return len(text)


def equals(text: str, example: dict) -> bool:
    return text == example["answer"]


def lengths(texts: list[str], examples: list[dict]) -> list[float]:
    return [len(text) + len(example["prompt"]) for text, example in zip(texts, examples, strict=True)]


def as_in_trl(completions: list, answer: list, **kwargs: list) -> list[float]:
    """Compare with the column, and see the prompts too."""
    assert list(kwargs) == ["prompts"]
    return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


def wanted(text: str, *, answer: str, weight: float = 1.0) -> float:
    return weight * (text == answer)


def stubborn(text: str) -> float:
    """Hang on b, ignoring all signals, with a child that hangs too."""
    if text == "b":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.run(["/bin/sleep", "61.25"], check=False)
        time.sleep(60)
    return float(len(text))


def backtracking(text: str) -> bool:
    """Hang in C, where no signal is answered and the lock of the interpreter is held."""
    return re.search("(a+)+b", text) is not None


def deadly(text: str) -> float:
    if text == "b":
        os._exit(7)
    return 1.0


def picky(text: str) -> float:
    if text == "b":
        raise KeyError("no b, please")
    return 1.0


def odd(text: str) -> object:
    return {"a": 1.0, "b": lambda: 0}.get(text, text)


def loaded_jax(text: str) -> bool:
    return "jax" in sys.modules


def process(text: str) -> int:
    return os.getpid()
