#!/bin/sh
# NumPyro 0.22.0: `numpyro.infer.importance.psis_diagnostic` tells k̂ = inf, its word for "not to be trusted", of a guide
# that is exactly the posterior. Weights that are all equal have no tail above the cutoff, which is taken for a tail with
# too few draws. A discrete guide that is nearly right meets the same: few values, many ties.
#
# Seen: a coin of .5 with a factor that makes it .8, guide Bernoulli(.8): every weight is the evidence, and k̂ is inf.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "numpyro==0.22.0" "jax==0.10.2"
cat > "$folder/exact.py" <<'PYTHON'
import warnings

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer.importance import psis_diagnostic

warnings.simplefilter("ignore")


def model():
    coin = numpyro.sample("coin", dist.Bernoulli(0.5))
    numpyro.factor("taste", jnp.log(jnp.where(coin == 1, 0.8, 0.2)))


def guide():
    numpyro.sample("coin", dist.Bernoulli(0.8))


print("k", psis_diagnostic(jax.random.key(0), {}, model, guide, num_particles=4000))
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/exact.py" | tee "$folder/told"
grep -qx 'k inf' "$folder/told"
