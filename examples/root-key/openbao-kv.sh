#!/bin/sh
# rekey.root_key_command for OpenBao, or HashiCorp Vault: the keyring is a secret of the KV engine
# (version 2), whose fields are those of the keyring. Needs curl and jq.
#
# Once:  bao kv put -mount=secret pg_rekey @keyring.json
#        echo 'path "secret/data/pg_rekey" { capabilities = ["read"] }' |
#            bao policy write pg_rekey -
# Then:  rekey.root_key_command = 'BAO_ADDR=https://bao.example:8200 /etc/pg_rekey/openbao-kv.sh'
#
# The token comes out of a file that only the server's user reads, kept fresh by an agent
# (bao agent: auto_auth with a file sink) or made once with that policy.
set -eu
addr=${BAO_ADDR:-https://127.0.0.1:8200}
token_file=${BAO_TOKEN_FILE:-/etc/pg_rekey/bao-token}
secret=${BAO_SECRET:-secret/data/pg_rekey}

# The token travels on stdin: arguments are seen by every user of the machine.
answer=$(printf 'X-Vault-Token: %s\n' "$(cat "$token_file")" |
    curl --silent --show-error --fail --max-time 8 --header @- "$addr/v1/$secret")
printf '%s' "$answer" | jq --compact-output --exit-status .data.data
