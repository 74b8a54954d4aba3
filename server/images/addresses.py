"""Which network addresses an image may be fetched from.

Owns the check of one address, or of one host written as an address. Knows nothing of DNS,
sockets or HTTP. Sources: the IANA special-purpose registries for IPv4 and IPv6 (RFC 6890 and
its successors).
"""

from __future__ import annotations

import re
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# Allowed by `allow_private_addresses`: an operator's own networks and machine.
PRIVATE = [
    ip_network(text)
    for text in (
        "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "127.0.0.0/8",
        "::1/128", "fc00::/7",
    )
]  # fmt: skip
# Always rejected: no image is there, and 169.254.169.254 gives out a cloud's credentials.
NEVER_V4 = [
    ip_network(text)
    for text in (
        "0.0.0.0/8", "169.254.0.0/16", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
        # Metadata and key services of clouds outside the link-local range.
        "100.100.100.200/32", "168.63.129.16/32",
    )
]  # fmt: skip
# Of IPv6 only global unicast is allowed, except ranges that embed or tunnel IPv4 (2001::/23 with
# Teredo, 2002::/16 6to4) or are for documentation. Outside it lie mapped and compatible addresses
# (::/96, ::ffff:0:0/96), NAT64 (64:ff9b::/96, 64:ff9b:1::/48), link-local, site-local (fec0::/10)
# and multicast.
GLOBAL_V6 = IPv6Network("2000::/3")
NEVER_V6 = [
    IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
] + [IPv6Network("fd00:ec2::/32"), IPv6Network("fd20:ce::/64")]  # clouds' metadata, IPv6
# Some resolvers read a last label of digits or 0x as an address (WHATWG URL, "ends in a number").
NUMBER_LABEL = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")


def is_allowed(address: Address, *, allow_private: bool) -> bool:
    """Whether an image may be fetched from this address."""
    if isinstance(address, IPv4Address):
        is_refused = any(address in network for network in NEVER_V4)
    else:
        is_refused = address.scope_id is not None or any(address in network for network in NEVER_V6)
    if is_refused:
        return False
    if any(address in network for network in PRIVATE):
        return allow_private
    return address in GLOBAL_V6 if isinstance(address, IPv6Address) else address.is_global


def parse_literal(host: str) -> Address | None:
    """The address that a host spells in its canonical form, or None for a name.

    Raises ValueError for forms that only some resolvers read as an address: decimal, octal,
    hexadecimal or shortened forms, and zones.
    """
    if ":" in host:
        return ip_address(host)
    labels = host.rstrip(".").split(".")
    if not NUMBER_LABEL.fullmatch(labels[-1]):
        return None
    return IPv4Address(host)
