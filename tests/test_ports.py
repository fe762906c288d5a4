"""Ports that tests listen on."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.ports import FIRST, LAST, free_ports


def test_ports_are_free_different_and_not_those_of_outgoing_connections() -> None:
    ports = free_ports(200)
    assert len(set(ports)) == 200
    assert all(FIRST <= port <= LAST for port in ports)
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if ephemeral.exists():
        low, high = map(int, ephemeral.read_text().split())
        assert low <= LAST or not any(low <= port <= high for port in ports)
    for port in ports[:5]:
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))
