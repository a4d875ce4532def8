#!/bin/sh
# tokenizers 0.23.1 does not heed the ids that a tokenizer.json states for its added tokens: one that leaves a gap
# behind the vocabulary (rows of an embedding that were kept free, say) gets the next free id in the place of its own,
# and so another row of the embedding, without an error or a warning. Written again, the file states the new id.
#
# Seen: a file that states id 10 behind a vocabulary of two gives id 2, and is written back with id 2.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "tokenizers==0.23.1"
cat > "$folder/read.py" <<'PYTHON'
import json

from tokenizers import Tokenizer, models

told = json.loads(Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str())
flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
told["added_tokens"] = [{"id": 10, "content": "<end>", "special": True, **flags}]
read = Tokenizer.from_str(json.dumps(told))
again = json.loads(read.to_str())["added_tokens"][0]["id"]
print("stated", 10, "read", read.token_to_id("<end>"), "encoded", read.encode("<end>").ids, "written", again)
PYTHON
"$folder/venv/bin/python" "$folder/read.py" | tee "$folder/told"
grep -qx 'stated 10 read 2 encoded \[2\] written 2' "$folder/told"
