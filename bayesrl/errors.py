"""The errors of bayesrl; each message names the thing, the value and the remedy."""


class BayesRLError(Exception):
    """Base class of every error that bayesrl raises on purpose."""


class PolicyError(BayesRLError, ValueError):
    """A policy program, or a site in it, cannot be used in this way."""


class GuideError(BayesRLError, ValueError):
    """A guide does not fit its policy."""


class ObjectiveError(BayesRLError, ValueError):
    """An objective would be biased or undefined for the given programs."""


class FitError(BayesRLError, RuntimeError):
    """A fit cannot start or continue."""


class RunFolderError(BayesRLError, OSError):
    """A run folder or a file cannot be read or written, or belongs to another problem."""


class EngineError(BayesRLError, ValueError):
    """An inference engine cannot compute the requested answer."""


class ControlError(BayesRLError, ValueError):
    """An environment or a control problem cannot be used in this way."""


class LanguageModelError(BayesRLError, ValueError):
    """A language model, its checkpoint or its tokenizer cannot be used in this way."""


class CacheError(BayesRLError, ValueError):
    """The cache of compiled programs cannot be used in this way."""


class PreferenceError(BayesRLError, ValueError):
    """Preferences, or a model of them, cannot be used in this way."""
