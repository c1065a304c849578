"""How connections and their ends are spelt, and what is said of a misspelling."""

from __future__ import annotations

import pytest

from migrate.errors import UsageError
from migrate.fourtuple import FourTuple, endpoint_text, parse_endpoint, unmapped


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10.0.0.1:80,10.0.0.9:53972", None),
        ("[fd00::1]:80,[fd00::9]:53972", None),
        ("[::]:80,[::]:0", None),
        ("0.0.0.0:65535,255.255.255.255:1", None),
        ("[FD00:0:0:0:0:0:0:1]:80,[fd00::9]:1", "[fd00::1]:80,[fd00::9]:1"),
        ("[::ffff:10.0.0.1]:80,[::ffff:a00:9]:53972", "10.0.0.1:80,10.0.0.9:53972"),
        ("[::ffff:10.0.0.1]:80,10.0.0.9:53972", "10.0.0.1:80,10.0.0.9:53972"),
    ],
)
def test_a_four_tuple_is_spelt(text: str, canonical: str | None) -> None:
    parsed = FourTuple.parse(text)
    assert str(parsed) == (canonical or text)
    assert FourTuple.parse(str(parsed)) == parsed
    assert parsed.reversed().reversed() == parsed
    assert parsed.family == (6 if "[" in str(parsed) else 4)


CONNECTION = "(write 10.0.0.1:80,10.0.0.9:53972 or [fd00::1]:80,[fd00::9]:53972)"
ENDPOINT = "(write 10.0.0.1:80, [fd00::1]:80, or the address alone)"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", f"'': a connection is two ends with one comma between them {CONNECTION}"),
        ("10.0.0.1:80", f"'10.0.0.1:80': a connection is two ends with one comma between them {CONNECTION}"),
        ("a,b,c", f"'a,b,c': a connection is two ends with one comma between them {CONNECTION}"),
        ("10.0.0.1,10.0.0.9:1", f"'10.0.0.1,10.0.0.9:1': each end of a connection has a port {CONNECTION}"),
        (
            "10.0.0.1:80,[fd00::9]:1",
            "'10.0.0.1:80,[fd00::9]:1': both ends of a connection are IPv4 addresses, "
            f"or both are IPv6 addresses {CONNECTION}",
        ),
        (
            "*:80,*:90",
            f"'*:80,*:90': both ends of a connection are IPv4 addresses, or both are IPv6 addresses {CONNECTION}",
        ),
        ("10.0.0.1:80,10.0.0.9:65536", f"'10.0.0.9:65536': '65536' is no port number {ENDPOINT}"),
        ("10.0.0.1:080,10.0.0.9:1", f"'10.0.0.1:080': '080' is no port number {ENDPOINT}"),
        ("10.0.0.1:80, 10.0.0.9:1", f"' 10.0.0.9:1': ' 10.0.0.9' is no IPv4 address {ENDPOINT}"),
        ("10.0.0.1:-1,10.0.0.9:1", f"'10.0.0.1:-1': '-1' is no port number {ENDPOINT}"),
        ("10.0.0.1:,10.0.0.9:1", f"'10.0.0.1:': '' is no port number {ENDPOINT}"),
        ("10.0.0.1:٨٠,10.0.0.9:1", f"'10.0.0.1:٨٠': '٨٠' is no port number {ENDPOINT}"),
        ("10.0.1:80,10.0.0.9:1", f"'10.0.1:80': '10.0.1' is no IPv4 address {ENDPOINT}"),
        ("10.0.0.01:80,10.0.0.9:1", f"'10.0.0.01:80': '10.0.0.01' is no IPv4 address {ENDPOINT}"),
        ("localhost:80,10.0.0.9:1", f"'localhost:80': 'localhost' is no IPv4 address {ENDPOINT}"),
        ("10.0.0.1\0:80,10.0.0.9:1", f"'10.0.0.1\\x00:80': '10.0.0.1\\x00' is no IPv4 address {ENDPOINT}"),
        ("fd00::1:80,fd00::9:1", f"'fd00::1:80': an IPv6 address stands in brackets {ENDPOINT}"),
        ("[10.0.0.1]:80,10.0.0.9:1", f"'[10.0.0.1]:80': '10.0.0.1' is no IPv6 address {ENDPOINT}"),
        (
            "[fd00::1:80,[fd00::9]:1",
            f"'[fd00::1:80': an IPv6 address ends with ']', and then comes ':PORT' or nothing {ENDPOINT}",
        ),
        (
            "[fd00::1]80,[fd00::9]:1",
            f"'[fd00::1]80': an IPv6 address ends with ']', and then comes ':PORT' or nothing {ENDPOINT}",
        ),
        (
            "[fe80::1%eth0]:80,[fe80::2]:1",
            f"'[fe80::1%eth0]:80': a zone names an interface of one host, it means nothing on another {ENDPOINT}",
        ),
    ],
)
def test_a_misspelt_four_tuple_is_explained(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        FourTuple.parse(text)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("text", "address", "port"),
    [
        ("10.0.0.1:80", b"\n\0\0\1", 80),
        ("10.0.0.1", b"\n\0\0\1", None),
        ("[fd00::1]:0", b"\xfd" + bytes(14) + b"\1", 0),
        ("[fd00::1]", b"\xfd" + bytes(14) + b"\1", None),
        ("[::ffff:1.2.3.4]", b"\1\2\3\4", None),
        ("*:443", b"", 443),
        ("*", b"", None),
    ],
)
def test_an_endpoint_is_spelt(text: str, address: bytes, port: int | None) -> None:
    assert parse_endpoint(text) == (address, port)
    assert parse_endpoint(endpoint_text((address, port))) == (address, port)


def test_only_mapped_addresses_are_unmapped() -> None:
    assert unmapped(bytes(10) + b"\xff\xff\1\2\3\4") == b"\1\2\3\4"
    for address in (b"\1\2\3\4", bytes(16), bytes(9) + b"\xff\xff" + bytes(5)):
        assert unmapped(address) is address
