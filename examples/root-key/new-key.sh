#!/bin/sh
# new-key.sh [KEYRING]: prints a keyring with one more root key than the file KEYRING has, or a new
# keyring with one. For providers that the server only reads. Needs python3; the key appears in no
# argument list.
#
# Work where nobody else looks on, in memory, and store the output at the provider, on every
# standby and in escrow:
#
#     umask 077; cd /dev/shm
#     new-key.sh > keyring.json                                 # the first one
#     new-key.sh keyring.json > more.json                       # before a rotation
#
# then `SELECT rekey.init_root_key()`, or `SELECT rekey.rotate_root_key('ID OF THE LAST KEY')`.
set -eu
exec python3 -c '
import datetime, hashlib, hmac, json, secrets, sys

ring = json.load(open(sys.argv[1])) if len(sys.argv) > 1 else {"version": 1, "keys": []}
key = secrets.token_bytes(32)
ring["keys"].append({
    "id": hmac.new(key, b"pg_rekey/v1/root-id", hashlib.sha256).hexdigest()[:32],
    "key": key.hex(),
    "created_at": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
})
print(json.dumps(ring, separators=(",", ":")))
' "$@"
