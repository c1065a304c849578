"""The requests and rule expressions of nftables that nft.py is built from (include/uapi/linux/netfilter/nf_tables.h).

Each function gives the bytes of one request or expression; nothing here talks to the kernel. Numbers are in network
order, what lies in a register is as in the packet, and a device index or a mark is in the host's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

from migrate.kernel.nfnetlink import (
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    attribute,
    attributes,
    message,
    nested,
    text,
    u16,
    u32,
    u64,
)

# include/uapi/linux/netfilter.h
NFPROTO_UNSPEC, NFPROTO_INET, NFPROTO_IPV4, NFPROTO_NETDEV, NFPROTO_IPV6 = 0, 1, 2, 5, 10
NF_INET_PRE_ROUTING, NF_INET_LOCAL_OUT, NF_NETDEV_INGRESS = 0, 3, 0
NF_DROP, NF_ACCEPT = 0, 1

# enum nf_tables_msg_types
NEWTABLE, GETTABLE, DELTABLE, NEWCHAIN, NEWRULE, DELRULE, NEWSET = 0, 1, 2, 3, 6, 8, 9
NEWSETELEM, GETSETELEM, DELSETELEM = 12, 13, 14

# enum nft_*_attributes
TABLE_NAME, TABLE_FLAGS, TABLE_USERDATA = 1, 2, 6
TABLE_F_OWNER = 2
CHAIN_TABLE, CHAIN_NAME, CHAIN_HOOK, CHAIN_TYPE = 1, 3, 4, 7
HOOK_HOOKNUM, HOOK_PRIORITY, HOOK_DEV = 1, 2, 3
RULE_TABLE, RULE_CHAIN, RULE_EXPRESSIONS = 1, 2, 4
SET_TABLE, SET_NAME, SET_FLAGS, SET_KEY_TYPE, SET_KEY_LEN, SET_DATA_TYPE, SET_DATA_LEN, SET_ID = 1, 2, 3, 4, 5, 6, 7, 10
SET_ELEM_KEY, SET_ELEM_DATA, SET_ELEM_TIMEOUT, SET_ELEM_EXPIRATION = 1, 2, 4, 5
SET_ELEM_LIST_TABLE, SET_ELEM_LIST_SET, SET_ELEM_LIST_ELEMENTS = 1, 2, 3
LIST_ELEM, DATA_VALUE, DATA_VERDICT, VERDICT_CODE, EXPR_NAME, EXPR_DATA = 1, 1, 2, 1, 1, 2

SET_MAP, SET_TIMEOUT, SET_EVAL = 0x8, 0x10, 0x20  # enum nft_set_flags
DYNSET_UPDATE, DYNSET_DELETE = 1, 2  # enum nft_dynset_ops
REG_VERDICT = 0  # enum nft_registers
NETWORK_HEADER, TRANSPORT_HEADER = 1, 2  # enum nft_payload_bases
META_PROTOCOL, META_MARK, META_NFPROTO, META_L4PROTO = 1, 3, 15, 16  # enum nft_meta_keys
CMP_EQ, CMP_NEQ = 0, 1  # enum nft_cmp_ops

UDATA_COMMENT = 0  # libnftnl's udata.h: how `nft list` finds a table's comment

# The nft program's numbers for types; the kernel keeps them so that `nft list` can print what a set holds.
TYPE_IPADDR, TYPE_IP6ADDR, TYPE_INET_SERVICE = 7, 8, 13

_MOST = 0xFFFF - 4  # bytes of elements in one request: an attribute's length, header included, has 16 bits
_KEY_OFFSET = 12  # in an element: after the headers of LIST_ELEM, SET_ELEM_KEY and DATA_VALUE


class Place(NamedTuple):
    """Where elements are: family, table and set."""

    family: int
    table: str
    set: str


def register(number: int) -> int:
    """The 4-byte register of that number, 0..15 (NFT_REG32_00 and on)."""
    return 8 + number


def concatenated(*types: int) -> int:
    """The nft program's type number of a concatenation."""
    number = 0
    for each in types:
        number = number << 6 | each
    return number


def new_table(family: int, name: str, comment: str, *, exclusive: bool, owned: bool = False) -> bytes:
    """``exclusive``: EEXIST if it is there; otherwise the one that is there stays. ``owned``: it goes when we do."""
    described = bytes((UDATA_COMMENT, len(comment) + 1)) + comment.encode() + b"\0"
    flags = NLM_F_CREATE | (NLM_F_EXCL if exclusive else 0)
    kept = attribute(TABLE_FLAGS, TABLE_F_OWNER.to_bytes(4)) if owned else b""
    return message(NEWTABLE, family, text(TABLE_NAME, name), kept, attribute(TABLE_USERDATA, described), flags=flags)


def del_table(family: int, name: str) -> bytes:
    """With all that is in it."""
    return message(DELTABLE, family, text(TABLE_NAME, name))


def get_tables(family: int) -> bytes:
    """A dump of that family's tables, of all families' for NFPROTO_UNSPEC."""
    return message(GETTABLE, family, flags=NLM_F_DUMP)


def table_entry(entry: memoryview) -> tuple[str, str]:
    """(name, comment) of an entry of that dump."""
    found = dict(attributes(entry))
    described = bytes(found.get(TABLE_USERDATA, b""))
    comment = described[2 : 2 + described[1]] if len(described) > 2 and described[0] == UDATA_COMMENT else b""
    return _string(bytes(found[TABLE_NAME])), _string(comment)


def new_chain(family: int, table: str, name: str, *, hook: int, priority: int, device: str = "") -> bytes:
    """A base chain of type filter that accepts what no rule decides. ``device`` is for netdev tables."""
    place = [u32(HOOK_HOOKNUM, hook), u32(HOOK_PRIORITY, priority & 0xFFFFFFFF)]
    if device:
        place.append(text(HOOK_DEV, device))
    body = text(CHAIN_TABLE, table), text(CHAIN_NAME, name), nested(CHAIN_HOOK, *place), text(CHAIN_TYPE, "filter")
    return message(NEWCHAIN, family, *body, flags=NLM_F_CREATE)


def new_rule(family: int, table: str, chain: str, *expressions: bytes) -> bytes:
    """A rule at the end of the chain."""
    body = text(RULE_TABLE, table), text(RULE_CHAIN, chain), nested(RULE_EXPRESSIONS, *expressions)
    return message(NEWRULE, family, *body, flags=NLM_F_CREATE | NLM_F_APPEND)


def del_rules(family: int, table: str, chain: str) -> bytes:
    """All rules of the chain."""
    return message(DELRULE, family, text(RULE_TABLE, table), text(RULE_CHAIN, chain))


def new_set(
    place: Place,
    number: int,
    *,
    key: tuple[int, int],
    data: tuple[int, int] | None = None,
    timeouts: bool = False,
    dynamic: bool = False,
) -> bytes:
    """A hash set, or with ``data`` a map. ``key`` and ``data`` are (type, bytes); ``number`` is unique in the batch.

    ``dynamic``: rules change it.
    """
    flags = (SET_TIMEOUT if timeouts else 0) | (SET_MAP if data else 0) | (SET_EVAL if dynamic else 0)
    body = [text(SET_TABLE, place.table), text(SET_NAME, place.set), u32(SET_FLAGS, flags), u32(SET_ID, number)]
    body += [u32(SET_KEY_TYPE, key[0]), u32(SET_KEY_LEN, key[1])]
    if data:
        body += [u32(SET_DATA_TYPE, data[0]), u32(SET_DATA_LEN, data[1])]
    return message(NEWSET, place.family, *body, flags=NLM_F_CREATE)


def add_elements(place: Place, keys: Sequence[bytes], *, timeout: int = 0, data: Sequence[bytes] = ()) -> list[bytes]:
    """Requests that add elements; one that is there already is no error, in a map if its data are the same.

    ``timeout`` in milliseconds, 0 for none; ``data``, for a map, runs beside ``keys``. All keys are of one length, a
    multiple of 4, and so are the data.
    """
    return _element_requests(NEWSETELEM, place, keys, timeout, data)


def delete_elements(place: Place, keys: Sequence[bytes]) -> list[bytes]:
    """Requests that take elements out; ENOENT if one is not there, or has expired."""
    return _element_requests(DELSETELEM, place, keys, 0, ())


def get_elements(place: Place) -> bytes:
    """A dump of a set."""
    body = text(SET_ELEM_LIST_TABLE, place.table), text(SET_ELEM_LIST_SET, place.set)
    return message(GETSETELEM, place.family, *body, flags=NLM_F_DUMP)


def element_entries(entry: memoryview) -> Iterator[tuple[bytes, bytes, int]]:
    """(key, data, milliseconds left or 0) of each element in an entry of that dump."""
    for kind, elements in attributes(entry):
        if kind == SET_ELEM_LIST_ELEMENTS:
            for _, element in attributes(elements):
                found = dict(attributes(element))
                data = found.get(SET_ELEM_DATA)
                left = int.from_bytes(found.get(SET_ELEM_EXPIRATION, b""))
                yield _value(found[SET_ELEM_KEY]), _value(data) if data else b"", left


def _element_requests(
    kind: int, place: Place, keys: Sequence[bytes], timeout: int, data: Sequence[bytes]
) -> list[bytes]:
    # The hot path: 10,000 elements take 4 ms. What is the same in all of them is made once and cut out of a template.
    key_length, data_length = len(keys[0]), len(data[0]) if data else 0
    timed = u64(SET_ELEM_TIMEOUT, timeout) if timeout else b""
    valued = nested(SET_ELEM_DATA, attribute(DATA_VALUE, bytes(data_length))) if data else b""
    template = nested(LIST_ELEM, nested(SET_ELEM_KEY, attribute(DATA_VALUE, bytes(key_length))), timed, valued)
    head, middle = template[:_KEY_OFFSET], template[_KEY_OFFSET + key_length : len(template) - data_length]
    elements = [head + key + middle + value for key, value in zip(keys, data or repeat(b""), strict=bool(data))]
    most = _MOST // len(template)
    where = text(SET_ELEM_LIST_TABLE, place.table), text(SET_ELEM_LIST_SET, place.set)
    flags = NLM_F_CREATE if kind == NEWSETELEM else 0
    return [
        message(
            kind, place.family, *where, nested(SET_ELEM_LIST_ELEMENTS, *elements[first : first + most]), flags=flags
        )
        for first in range(0, len(elements), most)
    ]


def meta(key: int, to: int) -> bytes:
    """Load a META_* property of the packet into a register."""
    return _expression("meta", u32(1, to), u32(2, key))


def payload(base: int, offset: int, length: int, to: int) -> bytes:
    """Load ``length`` bytes of the packet into registers, the last one filled up with zeros."""
    return _expression("payload", u32(1, to), u32(2, base), u32(3, offset), u32(4, length))


def compare(source: int, value: bytes, operator: int = CMP_EQ) -> bytes:
    """Go on with the rule only if the register holds ``value``."""
    return _expression("cmp", u32(1, source), u32(2, operator), nested(3, attribute(DATA_VALUE, value)))


def mask(source: int, value: bytes) -> bytes:
    """Register and ``value`` bit by bit, in place."""
    kept = nested(4, attribute(DATA_VALUE, value)), nested(5, attribute(DATA_VALUE, bytes(len(value))))
    return _expression("bitwise", u32(1, source), u32(2, source), u32(3, len(value)), *kept)


def lookup(name: str, source: int, to: int | None = None) -> bytes:
    """Go on only if the registers' content is in that set; with ``to``, load what the map has for it."""
    return _expression("lookup", text(1, name), u32(2, source), *(() if to is None else (u32(3, to),)))


def change_set(name: str, operation: int, source: int, timeout: int = 0) -> bytes:
    """Add the registers' content to that dynamic set, or begin its ``timeout`` (milliseconds) anew; or take it out."""
    timed = () if not timeout else (u64(6, timeout),)
    return _expression("dynset", text(1, name), u32(3, operation), u32(4, source), *timed)


def immediate(to: int, value: bytes) -> bytes:
    """Load a constant."""
    return _expression("immediate", u32(1, to), nested(2, attribute(DATA_VALUE, value)))


def verdict(code: int) -> bytes:
    """NF_ACCEPT or NF_DROP."""
    return _expression("immediate", u32(1, REG_VERDICT), nested(2, nested(DATA_VERDICT, u32(VERDICT_CODE, code))))


def log(group: int) -> bytes:
    """Copy the packet to NFLOG, each at once (``queue-threshold 1``), as long as the listener takes it."""
    return _expression("log", u16(1, group), u16(4, 1))


def forward(device: int, address: int, protocol: int) -> bytes:
    """Send the packet to the neighbour in register ``address`` on the device whose index is in register ``device``."""
    return _expression("fwd", u32(1, device), u32(2, address), u32(3, protocol))


def _expression(name: str, *data: bytes) -> bytes:
    return nested(LIST_ELEM, text(EXPR_NAME, name), nested(EXPR_DATA, *data))


def _value(data: memoryview) -> bytes:
    return bytes(next(value for kind, value in attributes(data) if kind == DATA_VALUE))


def _string(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")
