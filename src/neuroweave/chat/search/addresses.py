"""Which addresses may be fetched: plain web addresses of hosts on the public internet, and what a user allows by name.

The rules for names and literals are here; what a name resolves to is judged when it is dialled, see `dialling.py`.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

import httpx2

from neuroweave.chat.search.sources import SearchError

PORTS = {"http": 80, "https": 443}
LONGEST = 4_000  # characters of an address
UNSAFE = re.compile(r"[\x00-\x20\x7f-\x9f\\]")
HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
NUMERIC = re.compile(r"\d+|0x[0-9a-f]*")  # as the last label: an IPv4 address in one of its many spellings
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # stands for the IPv4 address in its last 32 bits
# Beyond what the ipaddress module knows: other ways to an IPv4 address, and a cloud's own services.
CLOSED = tuple(
    ipaddress.ip_network(each)
    for each in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b:1::/48", "2001::/32", "2002::/16", "fec0::/10",
                 "192.88.99.0/24", "168.63.129.16/32", "192.0.0.8/32", "3fff::/20")
)  # fmt: skip

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class AddressPolicy:
    """`allow_hosts`: names that may be anywhere, a local SearXNG for example; `host` on the usual ports, `host:port` on
    that one. `any_port`: public hosts on ports other than 80 and 443."""

    allow_hosts: frozenset[str] = frozenset()
    any_port: bool = False

    def allows(self, host: str, port: int) -> bool:
        names = {f"{host}:{port}"} | ({host} if port in PORTS.values() else set())
        return any(each.lower() in names for each in self.allow_hosts)


def checked_url(address: str, policy: AddressPolicy) -> httpx2.URL:
    """The address, parsed, without a dot at the end of its host. Raises SearchError for one that may not be fetched.

    What comes back is what is requested: no second parser gets to read the address in its own way.
    """
    if len(address) > LONGEST or UNSAFE.search(address):
        raise refusal(address, "it is too long, or has spaces, backslashes or control characters in it")
    try:
        url = httpx2.URL(address)
        host = url.raw_host.decode("ascii").lower().rstrip(".")
        port = url.port
    except (httpx2.InvalidURL, ValueError, TypeError):
        raise refusal(address, "it is not a web address") from None
    if url.scheme not in PORTS or not host:
        raise refusal(address, "only http and https are fetched")
    if url.userinfo or "@" in url.netloc.decode("ascii", "replace"):
        raise refusal(address, "it has a user name in it")
    if "%" in host:
        raise refusal(address, "it names a network interface")
    if ":" not in host and not HOST.fullmatch(host):
        raise refusal(address, "its host is no name")
    port = PORTS[url.scheme] if port is None else port
    if not policy.allows(host, port):
        if port != PORTS[url.scheme] and not policy.any_port:
            raise refusal(address, f"port {port} is not {PORTS[url.scheme]}")
        if (literal := literal_address(host, address)) and (reason := refused(literal)):
            raise refusal(address, f"it is {reason}")
    return url.copy_with(host=host, fragment=None)


def literal_address(host: str, address: str) -> IpAddress | None:
    """The IP address that a host is spelled as, None for a name. Raises SearchError for odd spellings of one."""
    if ":" not in host and not NUMERIC.fullmatch(host.rpartition(".")[2]):
        return None
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        raise refusal(address, "its host is a number; write an IP address as four numbers with dots") from None


def refused(ip: IpAddress) -> str:
    """Why an IP address is not on the public internet; empty for one that is."""
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            return "an address on a network interface"
        if ip in NAT64:
            return refused(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    if any(ip in network for network in CLOSED if network.version == ip.version):
        return "an address that stands for another"
    kinds = (
        (ip.is_loopback, "this machine"),
        (ip.is_link_local, "a link-local address"),
        (ip.is_multicast, "a multicast address"),
        (ip.is_unspecified, "no address"),
        (ip.is_private, "a private address"),
        (ip.is_reserved, "a reserved address"),
        (not ip.is_global, "not a public address"),
    )
    return next((reason for true, reason in kinds if true), "")


def refusal(address: str, reason: str) -> SearchError:
    return SearchError(f"{shown(address)}: not fetched: {reason}")


def shown(address: str) -> str:
    """An address for a message: no user name, no parameters, not long."""
    text = re.sub(r"//[^/?#]*@", "//", UNSAFE.sub("?", address))
    text = re.split(r"[?#]", text, maxsplit=1)[0]
    return text if len(text) <= 120 else text[:117] + "..."
