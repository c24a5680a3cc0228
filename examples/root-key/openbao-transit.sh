#!/bin/sh
# rekey.root_key_command for OpenBao, or HashiCorp Vault: the keyring lies on this machine,
# encrypted under a key of the transit engine that never leaves OpenBao. Needs curl and jq.
#
# Once:  bao secrets enable transit; bao write -f transit/keys/pg_rekey
#        bao write -field=ciphertext transit/encrypt/pg_rekey \
#            plaintext="$(base64 -w 0 keyring.json)" > /etc/pg_rekey/keyring.transit
#        echo 'path "transit/decrypt/pg_rekey" { capabilities = ["update"] }' |
#            bao policy write pg_rekey -
# Then:  rekey.root_key_command =
#            'BAO_ADDR=https://bao.example:8200 /etc/pg_rekey/openbao-transit.sh'
#
# Whoever steals the file needs OpenBao to read it, and OpenBao logs and can refuse each reading.
set -eu
addr=${BAO_ADDR:-https://127.0.0.1:8200}
token_file=${BAO_TOKEN_FILE:-/etc/pg_rekey/bao-token}
keyring=${BAO_KEYRING:-/etc/pg_rekey/keyring.transit}
key=${BAO_TRANSIT_KEY:-transit/decrypt/pg_rekey}

request=$(jq --null-input --rawfile text "$keyring" '{ciphertext: $text | rtrimstr("\n")}')
# The token travels on stdin: arguments are seen by every user of the machine. The request does
# not have to hide: it is the ciphertext.
answer=$(printf 'X-Vault-Token: %s\n' "$(cat "$token_file")" |
    curl --silent --show-error --fail --max-time 8 --header @- --data "$request" "$addr/v1/$key")
printf '%s' "$answer" | jq --raw-output --exit-status .data.plaintext | base64 --decode
