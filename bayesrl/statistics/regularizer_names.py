"""How what a fit aims at is written for a reader: regularisers, the best of n, judgements; readable without JAX."""

from collections.abc import Mapping
from typing import Any

_SYMBOLS = {
    "kl": "KL",
    "chi_squared": "χ²",
    "chi_squared_kl": "χ²+KL",
    "jensen_shannon": "JS",
    "jensen_shannon_sum": "2·JS",
    "forward_kl": "KL(π₀‖q)",
}

_FORMULAS = {
    "chi_squared": "χ² = E_π₀[(q/π₀ − 1)²]/2",
    "chi_squared_kl": "χ²+KL = E_π₀[(q/π₀ − 1)²]/2 + KL(q‖π₀)",
    "jensen_shannon": "JS = KL(q‖m)/2 + KL(π₀‖m)/2 with m = (q + π₀)/2",
    "jensen_shannon_sum": "2·JS = KL(q‖m) + KL(π₀‖m) with m = (q + π₀)/2",
    "forward_kl": "KL(π₀‖q) = E_π₀[log π₀/q]",
}


def regularizer_symbol(name: str, alpha: float | None = None) -> str:
    """Write the divergence of a regulariser as a symbol, such as χ².

    Example:
        >>> regularizer_symbol("chi_squared"), regularizer_symbol("alpha", 0.5)
        ('χ²', 'D_0.5')
    """
    return f"D_{alpha:g}" if name == "alpha" else _SYMBOLS[name]


def regularizer_formula(name: str, alpha: float | None = None) -> str:
    """Define the symbol of a regulariser other than KL."""
    if name == "alpha":
        return f"{regularizer_symbol(name, alpha)} = (E_π₀[(q/π₀)ᵅ] − 1)/(α·(α − 1)) with α = {alpha:g}"
    return _FORMULAS[name]


def regularizer_of(settings: Mapping[str, Any]) -> tuple[str, float | None]:
    """Return the name and the order of the regulariser that the settings of a fit tell."""
    return str(settings.get("regularizer", "kl")), settings.get("alpha")


def learns_directly(what: str) -> str:
    """Say what a fit to judgements aims at, from its settings' word on what it learns from."""
    return (
        f"The fit learns from judgements ({what}) and does not read the policy's reward; J, and the optimum that it is "
        "compared with, are those of this reward."
    )


def distils(n: int) -> str:
    """Say what a fit to the best of n draws aims at."""
    return (
        f"The fit distils the best of n = {n} draws of the prior: its optimum is their law pₙ and not p*, and J is not "
        "what it maximises."
    )
