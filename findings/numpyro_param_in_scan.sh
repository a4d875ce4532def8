#!/bin/sh
# NumPyro 0.22.0, `numpyro.param` in the body of a `scan`: the parameter is not learnt. `substitute` does not reach it,
# so that the loss is the one of the initial value whatever value is given, and its gradient is exactly zero. Declared
# before the scan, the same parameter is learnt.
#
# Seen: five observations of 3 under Normal(a, 1) with a = 0 at first: outside of the scan the loss falls from 27.09 to
# 4.59 where a is 3; inside it stays 27.09 for every a.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "numpyro==0.22.0" "jax==0.10.2"
cat > "$folder/learnt.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from numpyro.infer import Trace_ELBO


def outside(data):
    a = numpyro.param("a", 0.0)
    scan(lambda _, y: (None, numpyro.sample("y", dist.Normal(a, 1.0), obs=y)), None, data)


def inside(data):
    scan(lambda _, y: (None, numpyro.sample("y", dist.Normal(numpyro.param("a", 0.0), 1.0), obs=y)), None, data)


data = jnp.full(5, 3.0)
for model in (outside, inside):
    loss = lambda a: Trace_ELBO().loss(jax.random.key(0), {"a": a}, model, lambda data: None, data)
    print(f"{model.__name__}: {loss(0.0):.2f} at 0, {loss(3.0):.2f} at 3, slope {jax.grad(loss)(0.0):.1f}")
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/learnt.py" | tee "$folder/told"
grep -qx 'outside: 27.09 at 0, 4.59 at 3, slope -15.0' "$folder/told"
grep -Eqx 'inside: 27.09 at 0, 27.09 at 3, slope -?0.0' "$folder/told"
