"""A stand-in of Google Cloud KMS for the test of examples/root-key/gcp-kms.sh.

gcp_kms.py PORT KEY_NAME ADMIN_TOKEN DECRYPTER_TOKEN listens on this machine and has the one key
KEY_NAME (projects/P/locations/L/keyRings/R/cryptoKeys/K). The admin may do both, the decrypter may
decrypt. Requests are held to the reference of the REST API, v1: method and path, bearer token, the
fields of the body and no others, base64, sizes, CRC32C checksums. Encryption is real: AES-256-GCM
with the additional data, under a key that is made at the start and kept nowhere else.
"""

import base64
import http.server
import json
import os
import sys

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PORT, NAME, ADMIN, DECRYPTER = sys.argv[1:]
KEY = AESGCM(AESGCM.generate_key(256))
MAX_BYTES = 64 * 1024
FIELDS = {"encrypt": "plaintext", "decrypt": "ciphertext"}


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


class Refused(Exception):
    """An HTTP status, the API's name of it, and a message."""


def encoded(name, data):
    # int64 is a string in the API's JSON.
    return {name: base64.b64encode(data).decode(), name + "Crc32c": str(crc32c(data))}


def decoded(text):
    # Protobuf's JSON accepts both alphabets of RFC 4648; gcloud uses the URL-safe one.
    return base64.b64decode(text.translate(str.maketrans("-_", "+/")), validate=True)


class Kms(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(404, {"error": {"code": 404, "message": "Not found", "status": "NOT_FOUND"}})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        try:
            self.answer(200, self.served(body))
        except Refused as refused:
            code, status, message = refused.args
            self.answer(code, {"error": {"code": code, "message": message, "status": status}})

    def served(self, body):
        name, _, method = self.path.partition("?")[0].removeprefix("/v1/").rpartition(":")
        self.authorize(method)
        if name != NAME or method not in FIELDS:
            raise Refused(404, "NOT_FOUND", f"CryptoKey {name} not found.")
        data, aad = self.parsed(body, FIELDS[method])
        if method == "encrypt":
            nonce = os.urandom(12)
            return {
                "name": NAME + "/cryptoKeyVersions/1",
                **encoded("ciphertext", nonce + KEY.encrypt(nonce, data, aad)),
                "verifiedPlaintextCrc32c": True,
                "verifiedAdditionalAuthenticatedDataCrc32c": True,
                "protectionLevel": "SOFTWARE",
            }
        try:
            plaintext = KEY.decrypt(data[:12], data[12:], aad)
        except (InvalidTag, ValueError):
            raise Refused(
                400, "INVALID_ARGUMENT", "Decryption failed: the ciphertext is invalid."
            ) from None
        return {
            **encoded("plaintext", plaintext),
            "usedPrimary": True,
            "protectionLevel": "SOFTWARE",
        }

    def authorize(self, method):
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token not in (ADMIN, DECRYPTER):
            raise Refused(401, "UNAUTHENTICATED", "Invalid authentication credentials.")
        if token == DECRYPTER and method != "decrypt":
            raise Refused(403, "PERMISSION_DENIED", f"Permission denied to {method}.")

    def parsed(self, body, field):
        """The bytes of a field and the additional data, which may be left out."""
        try:
            request = json.loads(body)
            names = (field, "additionalAuthenticatedData")
            known = {*names, *(name + "Crc32c" for name in names)}
            if not {field} <= set(request) <= known:
                raise ValueError
            if self.headers.get_content_type() != "application/json":
                raise ValueError
            values = [decoded(request.get(name, "")) for name in names]
            sums = [int(request.get(n + "Crc32c", crc32c(v))) for n, v in zip(names, values)]
        except (ValueError, TypeError, AttributeError):
            raise Refused(400, "INVALID_ARGUMENT", "Invalid JSON payload received.") from None
        # A ciphertext is longer than what was encrypted.
        for name, value, checksum in zip(names, values, sums):
            if len(value) > MAX_BYTES + (256 if name == "ciphertext" else 0):
                raise Refused(400, "INVALID_ARGUMENT", f"{name} is too long.")
            if crc32c(value) != checksum:
                raise Refused(400, "INVALID_ARGUMENT", f"{name}Crc32c does not match.")
        return values

    def answer(self, code, document):
        body = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", int(PORT)), Kms).serve_forever()
