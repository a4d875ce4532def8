"""Typing errors on the command line: guess the intended command, in the form in which to type it."""

import math
import re
import shlex
from collections.abc import Mapping

from bayesrl.ready_models import COMMANDS, ProblemError, closest, model_names, model_options, model_uses

USES = {command: use for use, command in COMMANDS.items()}
_OPTIONS: Mapping[str, Mapping[str, type]] = {
    "fit": {
        "--beta": str,
        "--steps": int,
        "--restarts": int,
        "--seed": int,
        "--regularizer": str,
        "--alpha": str,
        "--out": str,
        "--set": str,
    },
    "learn": {"--explore": str, "--episodes": int, "--runs": int, "--seed": int, "--out": str, "--set": str},
    "resume": {"--steps": int, "--episodes": int},
    "report": {"--out": str, "--gold": str},
}
"""Options that take a value, by command, with their types; a test compares them with the commands themselves."""
_FLAGS = {**dict.fromkeys(_OPTIONS, ("--quiet", "--help")), "cache": ("--clear", "--help")}


def suggest_command(command: str, words: list[str]) -> str | None:
    """Correct what was typed; return None if nothing is recognisably wrong.

    Temperatures may be separated by spaces, an option of a model may lack `--set` or belong to another model, whole
    numbers may be written as 1e3 or 1,000, and names of options may be misspelt or belong to the other command.

    Example:
        >>> suggest_command("fit", ["bernoulli_bandit", "--beta", "0.1,", "0.2", "arms=3", "--steps", "1e3"])
        'fit bernoulli_bandit --beta 0.1,0.2 --set arms=3 --steps 1000'
    """
    # Separate options and values that are joined, as in --steps=3.
    apart = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    slips = _Slips(command, apart)
    mended = slips.mended()
    if slips.other is not None and slips.model in mended:
        mended[mended.index(slips.model)] = slips.other
    meant = [slips.command, *mended]
    return None if meant == [command, *apart] else shlex.join(meant)


class _Slips:
    """Corrects words one after another.

    Attributes:
        command: the intended command.
        model: the name or file of the model that was typed, or None.
        other: a model that has the requested option, if the typed one does not.
    """

    def __init__(self, command: str, words: list[str]) -> None:
        self.command, self.words = command, words
        known = model_names() if command in USES else {}
        self.model = next((word for word in words if word in known or word.endswith(".py")), None)
        self.other: str | None = None

    def mended(self) -> list[str]:
        """Return the corrected words."""
        done: list[str] = []
        at = 0
        while at < len(self.words):
            word = self.words[at]
            at += 1
            option = done[-2] if len(done) > 1 else ""
            if word.startswith("--") and word not in _FLAGS.get(self.command, ()):
                name, assigned = self._named(word)
                done.append(name)
                given = at < len(self.words) and not self.words[at].startswith("--")
                if assigned:
                    done.append(f"{assigned}={self.words[at] if given else 'true'}")
                elif given:
                    whole = _OPTIONS.get(self.command, {}).get(name) is int
                    done.append(_as_whole(self.words[at]) if whole else self.words[at])
                at += given
            elif option == "--beta" and re.fullmatch(r"[\d.,;eE+-]+", word):
                done[-1] = ",".join(part for part in re.split("[,;]", f"{done[-1]},{word}") if part)
            elif re.fullmatch(r"[a-z_]\w*=.+", word):
                done += ["--set", word]
            else:
                done.append(word)
        return done

    def _named(self, word: str) -> tuple[str, str]:
        """Return the intended option, and what it sets if that is `--set`."""
        mine = _OPTIONS.get(self.command, {})
        known = [name for name in (*mine, *_FLAGS.get(self.command, ())) if name != "--set"]
        if word in mine or self.command not in USES:
            return (word if word in mine else _nearest(word, known) or word), ""
        plain = word[2:].replace("-", "_")
        own = self._options_of(self.model, self.command)
        if plain in own:
            return "--set", plain
        bare = "--" + re.sub("^(num|n|number_of|max)_", "", plain)
        # Also --num-steps or --max-episodes: the options here lack the prefix.
        theirs = "learn" if self.command == "fit" else "fit"
        if bare in mine:
            return bare, ""
        if bare in _OPTIONS[theirs] and self._is_for(theirs):
            self.command = theirs
            return bare, ""
        if (near := _nearest(bare, known)) is not None:
            return near, ""
        if (near := closest(plain, list(own), 0.8)) is not None:
            return "--set", near
        having = [name for name in model_names() if plain in self._options_of(name, self.command)]
        if self.model in model_names() and having:
            self.other = closest(str(self.model), having) or having[0]
            return "--set", plain
        return word, ""

    def _is_for(self, command: str) -> bool:
        try:
            return self.model is not None and USES[command] in model_uses(self.model)
        except ProblemError:
            return False

    def _options_of(self, model: str | None, command: str) -> Mapping[str, object]:
        try:
            return {} if model is None else model_options(model, USES[command])
        except ProblemError:
            return {}


def _nearest(word: str, known: list[str]) -> str | None:
    """Return the option nearest to a word, or None; the dashes are left out, since they would count as a likeness."""
    near = closest(word[2:], [name[2:] for name in known], 0.65)
    return None if near is None else f"--{near}"


def _as_whole(text: str) -> str:
    """Write a whole number in plain digits; other text stays as it is."""
    plain = text.replace(",", "").replace("_", "")
    scale = {"k": 1e3, "m": 1e6}.get(plain[-1:].lower())
    try:
        number = float(plain[:-1]) * scale if scale else float(plain)
    except ValueError:
        return text
    return str(int(number)) if math.isfinite(number) and number == int(number) else text
