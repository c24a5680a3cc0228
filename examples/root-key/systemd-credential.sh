#!/bin/sh
# rekey.root_key_command for systemd credentials: the keyring is encrypted on disk, under the TPM or
# a key of the host, and systemd gives it to the server's unit alone, in memory.
#
# Once:  systemd-creds encrypt --name=pg_rekey keyring.json /etc/credstore.encrypted/pg_rekey
#        systemctl edit postgresql@15-main        # or the unit of your server
#            [Service]
#            User=postgres
#            LoadCredentialEncrypted=pg_rekey:/etc/credstore.encrypted/pg_rekey
# Then:  rekey.root_key_command = '/etc/pg_rekey/systemd-credential.sh'
#
# The credential belongs to the unit's User=, which must be the server's user: Debian's unit starts
# as root otherwise. It is read when the unit starts: for a rotation, encrypt the keyring with the
# new key and restart the server, then SELECT rekey.rotate_root_key('ROOT ID').
set -eu
exec cat "${CREDENTIALS_DIRECTORY:?is set by systemd for units with a credential}/pg_rekey"
