"""Which addresses are fetched: every spelling of a private one is refused, public ones and named hosts are not."""

from __future__ import annotations

import ipaddress

import pytest

from neuroweave.chat.search import SearchError
from neuroweave.chat.search.addresses import AddressPolicy, checked_url, refused, shown
from neuroweave.chat.search.sources import Source, deduplicated, normalized

PUBLIC = AddressPolicy()

TRICKY = [
    "http://127.0.0.1/",
    "http://127.0.0.1./",
    "http://2130706433/",  # 127.0.0.1 as one number
    "http://0x7f000001/",
    "http://0x7f.1/",
    "http://017700000001/",
    "http://0177.0.0.1/",
    "http://127.1/",
    "http://127.0.0.1.1/",
    "http://0/",
    "http://0.0.0.0/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://100.64.0.1/",
    "http://168.63.129.16/",
    "http://192.88.99.1/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://240.0.0.1/",
    "http://[::1]/",
    "http://[::]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::ffff:8.8.8.8]/",
    "http://[::127.0.0.1]/",
    "http://[2002:7f00:1::]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[64:ff9b:1::808:808]/",
    "http://[2001:0:7f00:1::]/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fec0::1]/",
    "http://[fc00::1]/",
    "http://[ff02::1]/",
    "http://[2001:db8::1]/",
    "http://\u2460\u2461\u2466.0.0.1/",  # circled digits, which IDNA makes plain
    "http://\uff11\uff12\uff17.0.0.1/",
    "http://user@example.com/",
    "http://user:secret@example.com/",
    "http://example.com@127.0.0.1/",
    "http://127.0.0.1#@example.com/",
    "http://127.0.0.1\\@example.com/",
    "http://example.com\\@127.0.0.1/",
    "http:///127.0.0.1/",
    "http://",
    "http://example.com:8080/",
    "http://example.com:443/",
    "https://example.com:80/",
    "http://example.com:0/",
    "http://example.com:99999/",
    "http://exa mple.com/",
    "http://[",
    "http://[::1",
    "http://exa|mple.com/",
    "http://a..b/",
    "http://example.com/\r\nHost: 127.0.0.1",
    "ftp://example.com/",
    "file:///etc/passwd",
    "gopher://example.com/",
    "javascript:alert(1)",
    "data:text/html,hello",
    "//example.com/",
    "example.com",
    "",
    "http://" + "a" * 5000 + ".com/",
]


@pytest.mark.parametrize("address", TRICKY, ids=range(len(TRICKY)))
def test_tricky_addresses_are_refused(address: str) -> None:
    with pytest.raises(SearchError, match="not fetched"):
        checked_url(address, PUBLIC)


@pytest.mark.parametrize(
    "address",
    [
        "http://example.com/",
        "https://example.com:443/a?b=c",
        "https://EXAMPLE.com./a",
        "http://8.8.8.8/",
        "http://[2606:4700:4700::1111]/",
        "http://[64:ff9b::808:808]/",
        "https://b\u00fccher.example/",
        "https://1password.com/",
        "https://0x.org/",
        "http://example.com:80/",
    ],
)
def test_public_addresses_pass(address: str) -> None:
    url = checked_url(address, PUBLIC)
    assert url.scheme in ("http", "https")
    assert not url.host.endswith(".")


def test_a_named_host_is_allowed_on_its_port_only() -> None:
    policy = AddressPolicy(allow_hosts=frozenset(["localhost:8888", "Wiki.LAN"]))
    assert checked_url("http://localhost:8888/search", policy).port == 8888
    assert checked_url("http://LOCALHOST.:8888/", policy).host == "localhost"
    assert checked_url("https://wiki.lan/page", policy).host == "wiki.lan"
    for address in ("http://localhost:8889/", "http://wiki.lan:81/", "http://127.0.0.1:8888/"):
        with pytest.raises(SearchError, match="not fetched"):
            checked_url(address, policy)


def test_any_port_opens_ports_and_nothing_else() -> None:
    policy = AddressPolicy(any_port=True)
    assert checked_url("http://example.com:8080/", policy).port == 8080
    with pytest.raises(SearchError, match="it is this machine"):
        checked_url("http://127.0.0.1:8080/", policy)


def test_every_special_network_is_refused() -> None:
    """The first and last address of the networks that IANA lists as not globally reachable."""
    networks = [
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.2.0/24",
        "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
        "::/128", "::1/128", "::ffff:0:0/96", "64:ff9b:1::/48", "100::/64", "2001:db8::/32", "2002::/16", "fc00::/7",
        "fe80::/10", "fec0::/10", "ff00::/8",
    ]  # fmt: skip
    for network in map(ipaddress.ip_network, networks):
        assert refused(network[0]), network
        assert refused(network[-1]), network
    assert not refused(ipaddress.ip_address("1.1.1.1"))
    assert not refused(ipaddress.ip_address("2606:4700::1"))


def test_messages_show_neither_names_nor_parameters() -> None:
    assert shown("https://user:secret@example.com/a?key=secret#secret") == "https://example.com/a"
    assert "secret" not in shown("http://a:secret@b:secret@example.com/?secret")


def test_spellings_of_one_page_are_equal() -> None:
    same = [
        "http://www.example.com/a/?b=1&c=2",
        "https://example.com:443/a?c=2&b=1#part",
        "https://example.com./a/?utm_source=x&b=1&c=2&gclid=z",
    ]
    assert len({normalized(address) for address in same}) == 1
    others = ["https://example.com/A?b=1&c=2", "https://example.com:8443/a?b=1&c=2", "https://example.com/a?b=2&c=2"]
    assert len({normalized(address) for address in [same[0], *others]}) == 4
    assert normalized("http://[bad") == "http://[bad"


def test_doubles_go() -> None:
    text = " ".join(f"word{number}" for number in range(60))
    nearly = text.replace("word30", "other")
    sources = [
        Source("one", "https://a.example/x", text),
        Source("same page", "http://www.a.example/x/", "something else entirely"),
        Source("same text", "https://b.example/", nearly),
        Source("other", "https://c.example/", "a short text"),
        Source("short, equal", "https://d.example/", "A short text!"),
        Source("empty", "https://e.example/", ""),
        Source("empty, too", "https://f.example/", ""),
    ]
    assert [source.title for source in deduplicated(sources)] == ["one", "other", "empty", "empty, too"]
