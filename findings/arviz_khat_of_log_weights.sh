#!/bin/sh
# arviz-stats 1.3.3: `pareto_khat(log_weights, log_weights=True)` takes the logarithms for the weights themselves. The
# flag chooses the right tail and does not exponentiate, so that weights of infinite variance look harmless.
#
# Seen: 1,000 log-weights from Normal(0, 3): k̂ = -.00 with the flag, 1.18 by the same function on the weights and 1.17 by
# `psislw`, where importance sampling is not to be trusted from .7 on.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "arviz-stats==1.3.3" "numpy==2.3.5" "scipy==1.16.3"
cat > "$folder/khat.py" <<'PYTHON'
import numpy as np
from arviz_stats.base import array_stats

log_weights = 3 * np.random.default_rng(0).normal(size=(1, 1000))
weights = np.exp(log_weights - log_weights.max())
print(f"flag {array_stats.pareto_khat(log_weights, log_weights=True):.2f}")
print(f"weights {array_stats.pareto_khat(weights):.2f}")
print(f"psislw {float(array_stats.psislw(-log_weights, axis=-1)[1].item()):.2f}")
PYTHON
"$folder/venv/bin/python" "$folder/khat.py" | tee "$folder/told"
grep -Eqx 'flag -?0.00' "$folder/told"
grep -qx 'weights 1.18' "$folder/told"
