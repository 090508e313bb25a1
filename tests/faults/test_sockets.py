"""A run on one machine is not reachable from the network: its meeting place has no password."""

from __future__ import annotations

import ipaddress

import psutil


def test_ranks_listen_on_the_loopback_address_only(stage):
    """The store's server, and gloo's sockets, one for each group of a rank."""
    with stage.started("dp2", stage.folder("sockets"), fault=("suspended_at", 3, 600.0)) as start:
        start.until(lambda: len(start.ranks()) == 2)
        ranks = start.ranks()
        start.until(lambda: all(rank.status() == psutil.STATUS_STOPPED for rank in ranks))
        processes = [psutil.Process(start.pid), *ranks]
        places = [
            ipaddress.ip_address(connection.laddr.ip)
            for process in processes
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
    assert len(places) > 2
    assert [place for place in places if not place.is_loopback] == []
