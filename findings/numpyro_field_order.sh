#!/bin/sh
# NumPyro 0.22.0 tells the fields of a distribution in the order of a Python set, so that one program is traced in
# several ways: the arrays of a distribution that passes through `jax.lax.scan` change places from process to process,
# and JAX's persistent cache of compiled programs, whose keys are the traced programs, finds them only by luck.
#
# Seen: over eight values of PYTHONHASHSEED, which Python draws anew for each process, Normal's leaves come as
# (loc, scale) in some and as (scale, loc) in others, and a scan that returns a Normal has two traced programs.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "numpyro==0.22.0" "jax==0.10.2"
cat > "$folder/traced.py" <<'PYTHON'
import hashlib

import jax
import numpyro.distributions as dist

traced = jax.make_jaxpr(lambda xs: jax.lax.scan(lambda c, x: (c, dist.Normal(x, 1.0 + x * x)), 0.0, xs))(jax.numpy.arange(3.0))
print(" ".join(dist.Normal.gather_pytree_data_fields()), hashlib.sha256(str(traced).encode()).hexdigest()[:12])
PYTHON
for seed in 0 1 2 3 4 5 6 7; do
    PYTHONHASHSEED=$seed JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/traced.py"
done | sort | uniq -c | tee "$folder/told"
test "$(wc -l < "$folder/told")" -eq 2
