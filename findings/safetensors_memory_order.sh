#!/bin/sh
# safetensors 0.8.0 writes the memory of a NumPy array as it lies: an array in column order, or a slice with a step, is
# written under its right shape with numbers in the wrong places, without an error or a warning. Weights transposed on
# their way from one framework to another are such arrays.
#
# Seen: what is read again differs from what was written; after `numpy.ascontiguousarray` it does not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "safetensors==0.8.0" "numpy==2.3.5"
cat > "$folder/written.py" <<'PYTHON'
import numpy as np
from safetensors.numpy import load, save

rows = np.arange(6, dtype=np.float32).reshape(2, 3)
for name, array in {
    "rows": rows,
    "columns": np.asfortranarray(rows),
    "transposed": rows.T,
    "every second": np.arange(12, dtype=np.float32)[::2],
    "transposed, made contiguous": np.ascontiguousarray(rows.T),
}.items():
    read = load(save({"weight": array}))["weight"]
    print(name, "as written" if np.array_equal(read, array) else f"{array.tolist()} became {read.tolist()}", sep=": ")
PYTHON
"$folder/venv/bin/python" "$folder/written.py" | tee "$folder/told"
test "$(grep -c 'became' "$folder/told")" -eq 3
test "$(grep -c 'as written' "$folder/told")" -eq 2
