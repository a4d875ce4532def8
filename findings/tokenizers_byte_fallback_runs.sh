#!/bin/sh
# tokenizers 0.23.3: the decoder `ByteFallback`, which tokenizers of Llama 2's and Gemma's kind have, says that it replaces
# byte tokens that cannot be converted. It replaces every byte of the run in which one stands: whole characters before a
# text's cut are lost with the half character at the cut, so that a text that is written token by token, or ends at its
# greatest length, changes backwards.
#
# Seen: the bytes of "Hi€" and the first two of another "€" are seven replacement characters; Python's own decoding of
# the same bytes keeps "Hi€". The bytes of "Hi€" alone are read as they should be.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "tokenizers==0.23.3"
cat > "$folder/decode.py" <<'PYTHON'
from tokenizers import decoders

decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
for data in ("Hi€".encode(), "Hi€€".encode()[:-1]):
    told = decoder.decode([f"<0x{byte:02X}>" for byte in data])
    print(len(data), "bytes:", ascii(told), "by Python:", ascii(data.decode(errors="replace")))
PYTHON
"$folder/venv/bin/python" "$folder/decode.py" | tee "$folder/told"
grep -qxF "5 bytes: 'Hi\u20ac' by Python: 'Hi\u20ac'" "$folder/told"
grep -qxF "7 bytes: '\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd' by Python: 'Hi\u20ac\ufffd'" "$folder/told"
