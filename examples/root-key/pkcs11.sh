#!/bin/sh
# rekey.root_key_command for an HSM or a smart card with PKCS#11: the keyring is a private data
# object of the token, which gives it out after a login only. Needs pkcs11-tool (OpenSC).
#
# Once:  pkcs11-tool --module MODULE --token-label pg_rekey --login --pin env:PKCS11_PIN \
#            --write-object keyring.json --type data --label pg_rekey --private
# Then:  rekey.root_key_command =
#            'PKCS11_MODULE=/usr/lib/softhsm/libsofthsm2.so /etc/pg_rekey/pkcs11.sh'
#
# For a rotation first take the old object out (--delete-object instead of --write-object): of two
# with one label pkcs11-tool reads any. It reads 5000 bytes at most, and tokens may hold less: a
# keyring has some 170 bytes per root key.
set -eu
: "${PKCS11_MODULE:?}"
pin_file=${PKCS11_PIN_FILE:-/etc/pg_rekey/pkcs11-pin}

# In the environment: arguments are seen by every user of the machine.
PKCS11_PIN=$(cat "$pin_file")
export PKCS11_PIN
# What it tells besides goes to stderr, where the server logs it.
exec pkcs11-tool --module "$PKCS11_MODULE" --token-label "${PKCS11_TOKEN:-pg_rekey}" \
    --login --pin env:PKCS11_PIN \
    --read-object --type data --label "${PKCS11_LABEL:-pg_rekey}"
