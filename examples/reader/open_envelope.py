#!/usr/bin/env python3
# Opens an envelope of pg_rekey without PostgreSQL, from a keyring file and the wrapped keys:
#     open_envelope.py KEYRING SLOTS ENVELOPE [CONTEXT]     prints what decrypt_col would return
# SLOTS is a CSV file with slot_id, key_name, root_id and wrapped_key. docs/format.md has the SQL
# that writes it, and the format that this follows line by line. ENVELOPE is hex, with or without
# \x. What is not right to the last bit is refused by an exception. Needs the package cryptography.
import csv, json, struct, sys
from cryptography.hazmat.primitives.ciphers import Cipher, aead, algorithms, modes

def xaes_open(key, nonce, sealed, aad):  # XAES-256-GCM: AES-256-GCM under a subkey of key and salt
    aes = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update
    k1 = int.from_bytes(aes(bytes(16)), "big") << 1
    k1 ^= (k1 >> 128) * (1 << 128 | 0x87)
    kx = lambda i: aes((int.from_bytes(b"\0%cX\0" % i + nonce[:12], "big") ^ k1).to_bytes(16, "big"))
    return aead.AESGCM(kx(1) + kx(2)).decrypt(nonce[12:], sealed, aad)

def unwrap(root_key, row):  # the DEK of a slot
    wrapped, name = bytes.fromhex(row["wrapped_key"]), row["key_name"].encode()
    if len(wrapped) != 73 or wrapped[0] != 1: raise ValueError("not a wrapped key")
    ids = bytes.fromhex(row["root_id"]) + struct.pack(">QI", int(row["slot_id"]), len(name))
    return xaes_open(root_key, wrapped[1:25], wrapped[25:], b"pg_rekey/v1/dek\0" + ids + name)

def open_envelope(dek, envelope, context=""):  # the type of the value, and its bytes
    magic, flags, slot = struct.unpack(">BBQ", envelope[:10])
    known = flags in ((0x11, 0x51, 0x91) if context else (0x01, 0x41, 0x81)) and 0 < slot < 1 << 63
    if magic != 0xF9 or not known or len(envelope) < 50: raise ValueError("not such an envelope")
    bound = struct.pack(">I", len(context.encode())) + context.encode() if context else b""
    payload = xaes_open(dek, envelope[10:34], envelope[34:], envelope[:10] + bound)
    end = 2 + int.from_bytes(payload[:2], "big") if flags >> 6 == 2 else 0
    if flags >> 6 == 2 and not 2 < end <= len(payload): raise ValueError("not a typed value")
    return ("text", "bytea", payload[2:end].decode())[flags >> 6], payload[end:]

if __name__ == "__main__":
    roots = {entry["id"]: entry["key"] for entry in json.load(open(sys.argv[1]))["keys"]}
    envelope = bytes.fromhex(sys.argv[3].removeprefix("\\x"))
    slots = {r["slot_id"]: r for r in csv.DictReader(open(sys.argv[2])) if r["root_id"] in roots}
    row = slots[str(int.from_bytes(envelope[2:10], "big"))]
    dek = unwrap(bytes.fromhex(roots[row["root_id"]]), row)
    kind, value = open_envelope(dek, envelope, *sys.argv[4:])
    sys.stdout.buffer.write(b"\\x" + value.hex().encode() if kind == "bytea" else value)
