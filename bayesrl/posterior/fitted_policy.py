"""A fitted policy as a program."""

from typing import Any

from numpyro import handlers

from bayesrl.core.programs import Programs
from bayesrl.guides import PolicyGuide
from bayesrl.typing import Params, Program


def fitted_policy(programs: Programs, params: Params) -> Program:
    """Return a program that draws from the guide and then runs as the policy, rewards included."""
    guide, values = programs.guide, programs.constrain(params)
    if guide is None:
        return handlers.substitute(programs.policy, data=values)
    if isinstance(guide, PolicyGuide):
        return handlers.substitute(guide.program, data=values)
    fitted = handlers.substitute(guide, data=values)
    policy = handlers.substitute(programs.policy, data=values if programs.learned else {})
    latent = programs.structure.names("action", "environment")

    def program(*args: Any) -> Any:
        # The guide's parameters are fixed by now, so a program around this one must not see them.
        with handlers.trace() as drawn, handlers.block(hide_fn=lambda msg: msg["type"] == "param"):
            fitted(*args)
        values = {
            name: site["value"]
            for name, site in drawn.items()
            if site["type"] == "plate" or (site["type"] == "sample" and name in latent)
        }
        # These sites are in the trace already, as the guide's draws; from the policy too they would clash.
        with (
            handlers.block(hide_fn=lambda msg: msg["type"] == "plate" or msg.get("name") in values),
            handlers.substitute(data=values),
        ):
            return policy(*args)

    return program
