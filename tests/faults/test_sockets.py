"""A run on one machine is not reachable from the network: its store has no password."""

from __future__ import annotations

import ipaddress

import psutil


def test_ranks_listen_on_the_loopback_address_only(stage):
    """Sockets of the store and of gloo, which has one per group and rank."""
    with stage.started("dp2", stage.folder("sockets"), fault=("suspended_at", 3, 600.0)) as start:
        start.until(lambda: len(start.ranks()) == 2)
        ranks = start.ranks()
        start.until(lambda: all(rank.status() == psutil.STATUS_STOPPED for rank in ranks))
        processes = [psutil.Process(start.pid), *ranks]
        addresses = [
            ipaddress.ip_address(connection.laddr.ip)
            for process in processes
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
    assert len(addresses) > 2
    assert [address for address in addresses if not address.is_loopback] == []
