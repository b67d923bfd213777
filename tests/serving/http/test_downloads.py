# SPDX-License-Identifier: Apache-2.0
"""Which hosts and addresses images may come from, in time and with a certificate of the host's own name."""

import asyncio
import datetime
import socket
import ssl
import time

import pytest


pytest.importorskip("httpx", reason="`pip install transformers[serving]` is missing")

from helpers.recorders import recorder  # noqa: E402
from modeling_moma.serving.http.downloads import Downloads, ImageHosts  # noqa: E402
from modeling_moma.serving.http.errors import RequestError  # noqa: E402


@pytest.mark.parametrize(
    ("entries", "allowed", "forbidden"),
    [
        ([], [], ["https://images.example", "http://127.0.0.1"]),
        (
            ["Images.Example"],
            ["https://images.example", "http://images.example:80", "https://IMAGES.example:443"],
            ["http://images.example:443", "http://a.images.example", "http://images.example.", "http://example"],
        ),
        (["images.example:8080"], ["http://images.example:8080"], ["http://images.example"]),
        (["10.0.0.0/8"], ["http://10.1.2.3"], ["http://11.0.0.1", "http://10.1.2.3:81", "http://010.1.2.3"]),
        (["[fd00::1]:90"], ["http://[fd00::1]:90"], ["http://[fd00::1]", "http://[fd00::2]:90"]),
        (["localhost:90"], ["http://localhost:90", "http://127.0.0.1:90"], ["http://localhost"]),
    ],
)
def test_hosts_are_asked_where_they_are_named_with_their_ports(entries, allowed, forbidden):
    downloads = Downloads(ImageHosts.from_entries(entries))
    for address in allowed:
        assert downloads._checked(address, "url")
    for address in forbidden:
        with pytest.raises(RequestError, match="image-hosts|no address"):
            downloads._checked(address, "url")


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
    ],
)
def test_a_name_may_lead_to_public_addresses_and_to_those_that_are_named(address, is_public):
    hosts = ImageHosts.from_entries(["images.example"])
    assert hosts.may_connect(address, 80, "http") is is_public
    plain = address.partition("%")[0]
    hosts = ImageHosts.from_entries(["images.example", plain])
    assert hosts.may_connect(address, 80, "http") and hosts.may_connect(address, 8080, "http") is is_public


@pytest.mark.parametrize(
    "entry",
    ["10.0.0.7:99999", "10.0.0.7:0", "[fd00::1]:65536", "[fd00::1]:0", "images.example:0", "a.example:70000"],
)
def test_a_port_that_there_is_not_is_refused_with_its_host(entry):
    with pytest.raises(ValueError, match="--image-hosts") as refusal:
        ImageHosts.from_entries(["images.example", entry])
    assert repr(entry) in str(refusal.value)


def fetch(address: str, entries: list[str], seconds: float = 10, tls: ssl.SSLContext | None = None) -> bytes:
    return asyncio.run(Downloads(ImageHosts.from_entries(entries), seconds, tls).fetch(address, "url"))


def test_a_download_has_a_time_in_all_and_not_for_each_of_its_pieces():
    with recorder() as web:
        began = time.monotonic()
        with pytest.raises(RequestError, match="could not be fetched"):
            fetch(f"http://127.0.0.1:{web.server_port}/trickle", [f"127.0.0.1:{web.server_port}"], seconds=1.2)
        assert 1 < time.monotonic() - began < 3


@pytest.mark.parametrize(("name", "is_right"), [("images.example", True), ("other.example", False)])
def test_a_certificate_is_verified_for_the_name_and_not_for_the_address(name, is_right, tmp_path, monkeypatch):
    pytest.importorskip("cryptography", reason="nothing here makes certificates")
    path = certificate(tmp_path, name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    trusted = ssl.create_default_context(cafile=str(path))
    real, asked = socket.getaddrinfo, []

    def resolve(host, *rest, **more):
        asked.append(host)
        return real("127.0.0.1" if host == "images.example" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with recorder() as web:
        web.socket = context.wrap_socket(web.socket, server_side=True)
        port = web.server_port
        address, entries = (
            f"https://images.example:{port}/disc.png",
            [f"images.example:{port}", f"127.0.0.1:{port}"],
        )
        if is_right:
            assert fetch(address, entries, tls=trusted) == web.image
            assert web.asked == [(f"images.example:{port}", "/disc.png")]
        else:
            with pytest.raises(RequestError, match="could not be fetched"):
                fetch(address, entries, tls=trusted)
            assert web.asked == []
    assert asked.count("images.example") == 1


def certificate(folder, name: str):
    """A file with a key and its certificate, signed by itself, for one name."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path = folder / "certificate.pem"
    path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + signed.public_bytes(pem))
    return path
