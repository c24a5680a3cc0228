#!/bin/sh
# rekey.root_key_command for Google Cloud KMS: the keyring lies on this machine, encrypted under a
# KMS key that never leaves Google. Needs the gcloud command line interface.
#
# Once:  printf pg_rekey > /etc/pg_rekey/keyring.aad
#        gcloud kms encrypt --location=europe-west3 --keyring=databases --key=pg_rekey \
#            --additional-authenticated-data-file=/etc/pg_rekey/keyring.aad \
#            --plaintext-file=keyring.json --ciphertext-file=/etc/pg_rekey/keyring.gcp
# Then:  rekey.root_key_command =
#            'KMS_LOCATION=europe-west3 KMS_RING=databases /etc/pg_rekey/gcp-kms.sh'
#        rekey.root_key_command_timeout = '30s'      # gcloud is slow to start
#
# Give the machine's service account roles/cloudkms.cryptoKeyDecrypter on that key, and nothing
# else. gcloud wants a folder that it may write into: CLOUDSDK_CONFIG.
set -eu
: "${KMS_LOCATION:?}" "${KMS_RING:?}"
keyring=${KMS_KEYRING:-/etc/pg_rekey/keyring.gcp}
aad=${KMS_AAD:-/etc/pg_rekey/keyring.aad}
export CLOUDSDK_CONFIG="${CLOUDSDK_CONFIG:-/var/lib/postgresql/.gcloud}"

exec gcloud kms decrypt --quiet \
    --location="$KMS_LOCATION" --keyring="$KMS_RING" --key="${KMS_KEY:-pg_rekey}" \
    --additional-authenticated-data-file="$aad" \
    --ciphertext-file="$keyring" --plaintext-file=-
