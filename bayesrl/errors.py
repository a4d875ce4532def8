"""The errors that bayesrl raises: each names the thing, the value and the remedy."""


class BayesRLError(Exception):
    """Base class of every error that bayesrl raises on purpose."""


class PolicyError(BayesRLError, ValueError):
    """A policy program, or a site in it, cannot be used as asked."""


class GuideError(BayesRLError, ValueError):
    """A guide does not fit the policy it stands beside."""


class ObjectiveError(BayesRLError, ValueError):
    """An objective would be biased, or undefined, for the programs at hand."""


class FitError(BayesRLError, RuntimeError):
    """A fit cannot start or cannot go on."""


class RunFolderError(BayesRLError, OSError):
    """A run folder, or a file, cannot be written, read, or belongs to another problem."""


class EngineError(BayesRLError, ValueError):
    """An inference engine cannot give the answer that was asked for."""


class ControlError(BayesRLError, ValueError):
    """An environment, or a problem of control, cannot be used as asked."""


class LanguageModelError(BayesRLError, ValueError):
    """A language model, its checkpoint or its tokenizer cannot be used as asked."""


class CacheError(BayesRLError, ValueError):
    """The cache of compiled programs cannot be used as asked."""
