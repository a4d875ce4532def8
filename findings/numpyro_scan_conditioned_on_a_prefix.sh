#!/bin/sh
# NumPyro 0.22.0, a `scan` under `condition` with fewer values than steps: the first steps take the values, the rest are
# drawn, but the whole site is marked as observed, and what was drawn counts as data.
#
# Seen: of four steps two are given; the site is observed with four values, two of which change with the seed, and the
# logarithm of the "likelihood of the data" changes with it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "numpyro==0.22.0" "jax==0.10.2"
cat > "$folder/conditioned.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro import handlers, sample
from numpyro.contrib.control_flow import scan
from numpyro.infer.util import log_density


def walk():
    def step(place, _):
        place = sample("place", dist.Normal(place, 1.0))
        return place, place

    scan(step, 0.0, None, length=4)


given = handlers.condition(walk, {"place": jnp.array([1.0, 2.0])})
sites = [handlers.trace(handlers.seed(given, jax.random.key(seed))).get_trace()["place"] for seed in (0, 1)]
print("observed:", *(site["is_observed"] for site in sites))
print("given steps agree:", bool((sites[0]["value"][:2] == sites[1]["value"][:2]).all()))
print("drawn steps agree:", bool((sites[0]["value"][2:] == sites[1]["value"][2:]).all()))
densities = {float(log_density(handlers.seed(given, jax.random.key(seed)), (), {}, {})[0]) for seed in (0, 1, 2)}
print("densities of the data:", len(densities))
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/conditioned.py" | tee "$folder/told"
grep -qx 'observed: True True' "$folder/told"
grep -qx 'given steps agree: True' "$folder/told"
grep -qx 'drawn steps agree: False' "$folder/told"
grep -qx 'densities of the data: 3' "$folder/told"
