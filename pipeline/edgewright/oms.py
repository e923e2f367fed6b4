"""A second signature for the OpenSSF model-signing tool (OMS 1.0): beside the bundle, not in it.

It covers every file of the unpacked bundle but the device's own signature, so
`model_signing verify key FOLDER --signature FILE --public_key KEY` accepts the folder that
`tar -x` makes. A Sigstore bundle around a DSSE envelope around an in-toto statement, signed with
ECDSA on P-256; the nonce is derived from the message (RFC 6979), so same bundle, same signature.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from edgewright.bundle import manifest
from edgewright.device import envelope
from edgewright.device.verify import Verified
from edgewright.errors import BadInput
from edgewright.signing import needs_cryptography, private_bytes, releasable

SUFFIX = ".oms.sig"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"


def sign(bundle: Path, key: Path, *, any_verdict: bool = False) -> bytes:
    """The signature file over a whole bundle, verified first. `key`: PEM, P-256, mode 0600.

    UsageError where the gate did not say PASS, unless `any_verdict`.
    """
    with needs_cryptography():
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    try:
        private: Any = serialization.load_pem_private_key(private_bytes(key), None)
    except (ValueError, TypeError):
        private = None  # the library's text could quote the key
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name != "secp256r1":
        raise BadInput(
            f"private key {key}",
            expected="an ECDSA key on P-256 in PEM, not encrypted",
            # Never that file's own name: it holds another key.
            hint="umask 077; openssl ecparam -name prime256v1 -genkey -noout -out NEW",
        )
    payload = statement(releasable(bundle, any_verdict))
    signature = private.sign(
        envelope.pae(PAYLOAD_TYPE, payload), ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
    )
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return manifest.canonical(
        {
            "mediaType": BUNDLE_TYPE,
            "verificationMaterial": {
                "publicKey": {"hint": hashlib.sha256(public).hexdigest()},
                "tlogEntries": [],
            },
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": PAYLOAD_TYPE,
                "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
            },
        }
    )


def statement(found: Verified) -> bytes:
    """All files with their digests, and one digest over these digests in the order of names."""
    facts = found.manifest
    files = {row["path"]: row["sha256"] for row in facts["files"]}
    files[manifest.PATH] = hashlib.sha256(found.manifest_bytes).hexdigest()
    names = sorted(files)
    root = hashlib.sha256(b"".join(bytes.fromhex(files[name]) for name in names)).hexdigest()
    name = f"{facts['name']}-{facts['version']}-{facts['target']}"
    value = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": root}}],
        "predicateType": PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [manifest.SIGNATURE],
            },
            "resources": [
                {"name": name, "algorithm": "sha256", "digest": files[name]} for name in names
            ],
        },
    }
    return json.dumps(value, sort_keys=True).encode()
