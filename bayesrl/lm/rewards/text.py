"""Rewards that read text: ordinary Python on the host."""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int

from bayesrl.arguments import Positive, checked, integer_range
from bayesrl.compilation.callbacks import host_call
from bayesrl.display.formatting import pluralize
from bayesrl.errors import LanguageModelError
from bayesrl.lm.prompts import Completions, Examples
from bayesrl.lm.rewards.base import Reward
from bayesrl.lm.rewards.reward_arguments import CallForm, call_form
from bayesrl.lm.rewards.worker_pool import Failure, WorkerPool
from bayesrl.value_checks import dtype_kind

_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_MAX_SHOWN = 80
"""Characters of a text that messages show."""

_log = logging.getLogger(__name__)


type _Workers = Annotated[int, integer_range(0, 1000)]


@dataclass(frozen=True, eq=False, kw_only=True)
class TextReward(Reward):
    """A Python function of the text of one completion; see `text_reward`."""

    fn: Callable[..., Any]
    name: str
    form: CallForm
    num_workers: int = 0
    time_limit: float | None = None
    on_error: float | Literal["stop"] = "stop"
    special: bool = False
    only_field: str | None = None  # what it reads of a record, if that is known
    _workers: WorkerPool | None = field(default=None, init=False, repr=False)
    # A list, because a frozen dataclass cannot count in a number.
    _failures: list[int] = field(default_factory=lambda: [0], init=False, repr=False)

    def __post_init__(self) -> None:
        count = max(self.num_workers, 0 if self.time_limit is None else 1)
        if count:
            object.__setattr__(self, "_workers", WorkerPool(self.fn, self.name, count, self.time_limit))

    def __call__(self, completions: Completions) -> Array:
        """Return the function's value for each completion, [...]."""
        require_tokenizer(completions.examples, self.name)
        scores = functools.partial(self.on_host, completions.examples)
        shape = jax.ShapeDtypeStruct(completions.index.shape, jnp.float32)
        return host_call(scores, shape, completions.index, completions.tokens, completions.mask)

    @property
    def separate(self) -> bool:
        """Whether texts are scored one by one, and not in batches; see `Reward.separate`."""
        return not self.form.batched

    @property
    def fields(self) -> frozenset[str] | None:
        """None for a function of the whole record; see `Reward.fields`."""
        return self.form.fields if self.only_field is None else frozenset({self.only_field})

    def on_host(self, examples: Examples, index: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Score completions [..., T] of the prompts with these numbers, [...], on the host; errors as in `scores`."""
        texts = decode_completions(examples, tokens, mask, special=self.special)
        return self.scores(index.reshape(-1), texts, examples).reshape(index.shape)

    def scores(self, index: Any, texts: Sequence[str], examples: Sequence[Any]) -> np.ndarray:
        """Score texts, on the host.

        Args:
            index: number of the example of each text, [texts].
            texts: the completions.
            examples: the records behind the prompts.

        Returns:
            [texts], float32; equal texts are scored once.
        """
        # A function that sees no example need not score a text twice for two prompts.
        pairs = [(int(at) if self.form.reads_records else 0, text) for at, text in zip(index, texts, strict=True)]
        unique = list(dict.fromkeys(pairs))
        size = max(1, math.ceil(len(unique) / max(1, self.num_workers)) if self.form.batched else 1)
        parts = [unique[at : at + size] for at in range(0, len(unique), size)]
        values: dict[tuple[int, str], float] = {}
        for part, answer in zip(parts, self._call_all(parts, examples), strict=True):
            values |= zip(part, self._check_values(answer, part), strict=True)
        return np.asarray([values[pair] for pair in pairs], np.float32)

    def close(self) -> None:
        """Stop the worker processes; they start again when needed."""
        if self._workers is not None:
            self._workers.close()

    @property
    def num_failures(self) -> int:
        """How many texts got the score `on_error`."""
        return self._failures[0]

    # ---- calls and their answers -------------------------------------------------------------

    def _call_all(self, parts: list[list[tuple[int, str]]], examples: Sequence[Any]) -> list[Any]:
        calls = [self._make_call(part, examples) for part in parts]
        if self._workers is None:
            return [self._call(call, part) for call, part in zip(calls, parts, strict=True)]
        answers = self._workers.run(calls, keep_going=self.on_error != "stop")
        for part, answer in zip(parts, answers, strict=True):
            if isinstance(answer, Failure):
                self._handle_failure(answer, part)
        return answers

    def _make_call(self, part: list[tuple[int, str]], examples: Sequence[Any]) -> Any:
        rows = [examples[index] for index, _ in part] if self.form.reads_records else []
        return self.form.arguments(self.name, [text for _, text in part], rows, examples)

    def _call(self, call: Any, part: list[tuple[int, str]]) -> Any:
        try:
            return self.fn(**call) if isinstance(call, dict) else self.fn(*call)
        except Exception as error:  # noqa: BLE001  (whatever a user's function raises)
            failure = Failure.of(type(error).__name__, str(error), cause=error)
            self._handle_failure(failure, part)
            return failure

    def _handle_failure(self, failure: Failure, part: list[tuple[int, str]]) -> None:
        """Raise an error, or count the failure."""
        if failure.error == LanguageModelError.__name__:  # the library's own errors already name the remedy
            raise LanguageModelError(failure.said) from None
        what = f"reward {self.name!r} {failure.what}, on {_describe([text for _, text in part])}"
        if self.on_error == "stop":
            late = failure.error == "" and self.time_limit is not None
            remedy = "raise time_limit" if late else "mend the function"
            error = LanguageModelError(f"{what}; {remedy}, or pass on_error=0.0 to score such texts by a number")
            if failure.traceback:
                error.add_note(f"In the worker process:\n{failure.traceback}")
            raise error from failure.cause
        if self.num_failures == 0:
            _log.warning("%s; it is scored by %g, as others will be without a word", what, self.on_error)
        self._failures[0] += len(part)

    def _check_values(self, answer: Any, part: list[tuple[int, str]]) -> list[float]:
        if isinstance(answer, Failure):
            return [float(self.on_error)] * len(part)
        texts = [text for _, text in part]
        if not self.form.batched:
            return [self._check_value(answer, texts[0])]
        try:
            given = [] if isinstance(answer, str | bytes | Mapping | Set) else list(answer)
        except TypeError:
            given = []
        if len(given) != len(texts):
            what = pluralize(len(given), "value") if given else f"{answer!r:.{_MAX_SHOWN}}"
            raise LanguageModelError(
                f"reward {self.name!r} returned {what} for {_describe(texts)}; with batched=True, or completions=, "
                "return one number for each text"
            )
        return [self._check_value(value, text) for value, text in zip(given, texts, strict=True)]

    def _check_value(self, value: Any, text: str) -> float:
        """Check a function's result; −∞ is allowed, and forbids a text."""
        number = value if type(value) is float else _as_float(value)
        # nan fails both comparisons.
        if number is not None and (abs(number) <= _MAX_FLOAT32 or number == -math.inf):
            return number
        kind = "" if number is not None else f", a {type(value).__name__},"
        raise LanguageModelError(
            f"reward {self.name!r} returned {value!r:.{_MAX_SHOWN}}{kind} for {_describe([text])}; return one finite "
            "number (or -inf, which forbids a text)"
        )


@checked(LanguageModelError)
def text_reward(
    fn: Callable[..., Any],
    *,
    num_workers: _Workers = 0,
    time_limit: Positive | None = None,
    on_error: float | Literal["stop"] = "stop",
    batched: bool = False,
    special: bool = False,
    name: str | None = None,
) -> TextReward:
    """Make a reward from a Python function of the text.

    The function runs on the host, in the middle of a compiled step. A batch scores equal texts (of the same prompt, if
    the function sees examples) only once, so the function must be deterministic. It must not call JAX, which can
    deadlock on a CPU with few cores, unless num_workers=1 gives it its own process.

    Args:
        fn: `fn(text)` or `fn(text, example)`, where the example is the record of the prompt: a mapping with `prompt`
            and its other fields. A second argument with a default is an example only if it is named `example`. Or
            `fn(text, *, answer)`, which gets fields of the record by name; or, as TRL has it, `fn(completions, answer,
            **kwargs)`, which gets lists by name: completions, prompts, and the fields that it names, or all of them
            with `**kwargs`. The latter gets conversations as lists of messages; a record without a field gives None.
        num_workers: processes that call the function; 0 calls it in this process. With workers, it must be importable:
            defined at the top level of a module. A script that starts workers needs `if __name__ == "__main__":`.
        time_limit: seconds per text (per call if `batched`). It needs at least one worker process, which is killed
            when the function takes longer, even if it hangs.
        on_error: "stop", or the score of texts for which the function raises, takes too long or ends its process.
            It logs one warning, and `num_failures` counts.
        batched: the function takes lists, `fn(texts)` or `fn(texts, examples)`, and returns as many numbers.
        special: whether the text has special tokens, such as its end or marks of thought; it never has padding.
        name: for messages; by default the function's own.

    Raises:
        LanguageModelError: an option is invalid, or the function takes other arguments. On use, naming the text:
            the function raised, took too long, or did not return a number below infinity. Compiled code that you call
            outside the library raises jax.errors.JaxRuntimeError with the same message.

    Example:
        >>> right = text_reward(lambda text, example: text == example["answer"])
        >>> right.scores([0, 0], ["2", "3"], [{"prompt": "1+1=", "answer": "2"}]).tolist()
        [1.0, 0.0]
        >>> def as_in_trl(completions, answer, **kwargs):
        ...     return [float(text == wanted) for text, wanted in zip(completions, answer)]
        >>> text_reward(as_in_trl).scores([0, 0], ["2", "3"], [{"prompt": "1+1=", "answer": "2"}]).tolist()
        [1.0, 0.0]
    """
    name = _name_of(fn) if name is None else name
    return TextReward(
        fn=fn,
        name=name,
        form=call_form(fn, name, batched=batched),
        num_workers=num_workers,
        time_limit=None if time_limit is None else float(time_limit),
        on_error=on_error,
        special=special,
    )


@checked(LanguageModelError)
def as_reward(reward: Any) -> Reward:
    """Return a reward as it is, and turn a function into a reward of the text.

    Example:
        >>> as_reward(len).name
        'len'
    """
    if isinstance(reward, Reward):
        return reward
    if callable(reward):
        return text_reward(reward)
    raise LanguageModelError(
        f"reward={reward!r:.{_MAX_SHOWN}} is no reward; pass a function of the text, or rewards.token_reward(fn)"
    )


@checked(LanguageModelError)
def decode_completions(
    examples: Examples,
    tokens: Int[np.ndarray | Array, "*texts T"],
    mask: Bool[np.ndarray | Array, "*texts T"],
    *,
    special: bool = False,
) -> list[str]:
    """Decode the tokens of completions [..., T] that the mask counts, with or without special tokens."""
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    if tokens.shape != mask.shape:
        raise LanguageModelError(
            f"decode_completions got tokens {tokens.shape} and mask {mask.shape}; pass one mask for each token"
        )
    width = tokens.shape[-1]
    rows = zip(tokens.reshape(-1, width), mask.reshape(-1, width), strict=True)
    tokenizer = require_tokenizer(examples, "on text")
    decode: list[str] = tokenizer.decode([row[kept] for row, kept in rows], skip_special=not special, continues=True)
    return decode


def require_tokenizer(examples: Examples, name: str) -> Any:
    """Return the tokenizer that decodes completions, or raise."""
    if examples.tokenizer is None:
        raise LanguageModelError(
            f"reward {name!r} reads text, and the prompts were given as tokens; pass a tokenizer and texts, or use "
            "rewards.token_reward(fn)"
        )
    return examples.tokenizer


def _name_of(fn: Any) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return str(getattr(getattr(fn, "func", fn), "__name__", type(fn).__name__))


def _as_float(value: Any) -> float | None:
    """Read a real number of Python, NumPy or JAX; None for anything else, such as an array that holds a text."""
    try:
        return float(value) if dtype_kind(value) in ("b", "i", "u", "f") else None
    except OverflowError:
        return None


def _describe(texts: Sequence[str]) -> str:
    """Show a text, or the first of several, shortened."""
    first = texts[0] if len(texts[0]) <= _MAX_SHOWN else f"{texts[0][: _MAX_SHOWN - 1]}…"
    return f"the text {first!r}" if len(texts) == 1 else f"{len(texts)} texts, the first {first!r}"
