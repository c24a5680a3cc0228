#!/bin/sh
# rekey.root_key_command for AWS KMS: the keyring lies on this machine, encrypted under a KMS key
# that never leaves AWS. Needs the AWS command line interface.
#
# Once:  aws kms encrypt --key-id alias/pg_rekey --plaintext fileb://keyring.json \
#            --encryption-context application=pg_rekey \
#            --query CiphertextBlob --output text | base64 --decode > /etc/pg_rekey/keyring.kms
# Then:  rekey.root_key_command = 'AWS_DEFAULT_REGION=eu-central-1 /etc/pg_rekey/aws-kms.sh'
#
# KMS encrypts 4096 bytes at most: some 20 root keys. Give the machine's role kms:Decrypt on that
# key with the condition kms:EncryptionContext:application = pg_rekey, and nothing else. Each
# reading is in CloudTrail. AWS_ENDPOINT_URL names another endpoint, for a VPC or for tests. The
# variable of the region is the one that versions 1 and 2 of the AWS command line interface read.
set -eu
keyring=${KMS_KEYRING:-/etc/pg_rekey/keyring.kms}
# Two attempts of 3 s end within rekey.root_key_command_timeout, so that the log says why. The
# default of five would not.
export AWS_MAX_ATTEMPTS="${AWS_MAX_ATTEMPTS:-2}"

plaintext=$(aws kms decrypt --ciphertext-blob "fileb://$keyring" \
    --encryption-context application=pg_rekey \
    --cli-connect-timeout 3 --cli-read-timeout 3 \
    --query Plaintext --output text)
printf '%s' "$plaintext" | base64 --decode
