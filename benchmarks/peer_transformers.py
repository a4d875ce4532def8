"""Load folders that bayesrl saved in transformers; the last line of the output is the answer, as JSON."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def main(root: Path) -> None:
    """Load every folder, and write its logits of tokens.npy to theirs.npy."""
    kinds = {}
    for path in sorted(root.glob("*/config.json")):
        folder = path.parent
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        strange = {name: sorted(map(str, found)) for name, found in report.items() if found}
        if strange:
            raise SystemExit(f"{folder}: {strange}")
        with torch.no_grad():
            logits = model.eval()(torch.as_tensor(np.load(folder / "tokens.npy"))).logits
        np.save(folder / "theirs.npy", logits.numpy())
        kinds[folder.name] = type(model).__name__
    print(json.dumps(kinds))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
