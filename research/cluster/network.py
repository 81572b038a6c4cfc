"""This host in the network: the address that gloo gives to the other ranks, the interface that leads to them, and their first meeting."""

import ipaddress
import os
import socket
import time
from pathlib import Path

import psutil

from parallel.errors import Mistake, listed
from parallel.process_identity import BOOT_ID
from research.cluster.environment import GLOO_INTERFACE, Ranks, gloo_interfaces

NETWORK_NAMESPACE = Path("/proc/self/ns/net")
TRY_SECONDS = 3.0
"""How long one attempt to connect may take, and at most until the next one."""


def machine() -> str:
    """Differs on two hosts, and in two containers of one host that have networks of their own."""
    boot_id = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else socket.gethostname()
    return f"{boot_id} {os.readlink(NETWORK_NAMESPACE) if NETWORK_NAMESPACE.exists() else ''}"


def gloo_address(interfaces: list[str] | None = None, host: str | None = None) -> str:
    """The address at which gloo lets the other ranks connect to this one; '' if it finds none.

    It is that of the interface that GLOO_SOCKET_IFNAME names, or else the first one that the host's own name stands for and that
    this host has. On Debian, /etc/hosts gives every host the name 127.0.1.1, at which no other host can reach it.
    """
    interfaces = gloo_interfaces() if interfaces is None else interfaces
    host = host or socket.gethostname()
    if interfaces:
        existing = psutil.net_if_addrs()
        for name in interfaces:
            if name not in existing:
                raise Mistake(
                    f"{GLOO_INTERFACE} = {name}, but {host} has the interfaces {listed(sorted(existing), 'and')} → name one of them"
                )
        return next((address.partition("%")[0] for address in _addresses(interfaces[0])), "")
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return ""
    for family, kind, protocol, _, address in entries:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return str(address[0])
    return ""


def is_loopback(address: str) -> bool:
    """Whether no other host can reach this address: 127.0.1.1, ::1, or none at all."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return True


def interface_of(address: str) -> str:
    """The name of the interface that has this address; '' if none has."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return "lo" if is_loopback(address) and address else ""


def interface_to(address: str) -> tuple[str, str]:
    """(name, own address) of the interface that leads to `address`; two empty strings if there is no way. Nothing is sent."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            own = str(probe.getsockname()[0])
    except OSError:
        return "", ""
    return interface_of(own), own


def interface_to_others(master: str) -> str:
    """The name of the interface that leads to the master address; if that is this very host, the first one that is not its loopback."""
    name, own = interface_to(master)
    if name and not is_loopback(own):
        return name
    up = (name for name, state in psutil.net_if_stats().items() if state.isup)
    return next((name for name in up if any(not is_loopback(each) for each in _addresses(name))), "")


def _addresses(interface: str) -> list[str]:
    return [entry.address for entry in psutil.net_if_addrs().get(interface, []) if entry.family in (socket.AF_INET, socket.AF_INET6)]


def unreachable_sentence(host: str, address: str, own_interface: str) -> str:
    """What is wrong with the address that gloo would give to the other ranks for this host, and what helps."""
    what = f"the name of host {host} stands for {address}" if address else f"the name of host {host} cannot be resolved"
    return (
        f"{what}, at which no other host can reach it → set {GLOO_INTERFACE}={own_interface or 'eth0'}, the interface to the other hosts, "
        f"in the environment of every rank (deepspeed passes on what stands in ~/.deepspeed_env), or correct /etc/hosts on {host}"
    )


def wait_until_listening(ranks: Ranks, seconds: float) -> str:
    """Waits until the master address accepts a connection; '' if it does, else why it did not within `seconds`.

    Plain sockets are used: torch's store writes a page to standard error for each attempt that fails.
    """
    deadline, pause, why = time.monotonic() + seconds, 0.05, "no time"
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((ranks.master_addr, ranks.master_port), timeout=min(TRY_SECONDS, max(0.1, left))).close()
            return ""
        except OSError as error:
            why = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(2 * pause, TRY_SECONDS / 3)
    return why
