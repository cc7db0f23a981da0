"""What this process may use of the machine, where control groups (containers, Slurm jobs) leave it a part."""

from __future__ import annotations

import fcntl
import math
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from gowide_dist.errors import UserError

OWN_GROUPS = Path("/proc/self/cgroup")
HIERARCHIES = Path("/sys/fs/cgroup")


def num_cores() -> int:
    """Cores that this process may use: those that it is bound to, or fewer by a quota, rounded up."""
    cores = len(os.sched_getaffinity(0))
    for group in control_groups("cpu"):
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # version 2, version 1
            with suppress(OSError, ValueError):  # no such file; "max": no quota
                quota, period = (int(number) for file in files for number in (group / file).read_text().split())
                if quota > 0:  # version 1 has -1 for none
                    cores = min(cores, math.ceil(quota / period))
    return cores


def control_groups(controller: str) -> Iterator[Path]:
    """Folders of the groups of this process, of versions 1 and 2, from its own up to the root: each sets a limit.

    A container may name its group as the host does, and see that group as the root; folders that it lacks are named
    too.
    """
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            roots = {HIERARCHIES / controllers, HIERARCHIES / controller}
        else:
            roots = set() if controllers else {HIERARCHIES, HIERARCHIES / "unified"}
        for root in roots:
            group = root / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def mend_loopback(peers: Iterable[str]) -> None:
    """Where this machine's name stands for loopback, and a peer's does not, tell gloo which network interface reaches
    the peer (GLOO_SOCKET_IFNAME): else it would listen where no peer reaches it. Raises UserError if there is none.
    """
    own = socket.gethostname()
    if os.environ.get("GLOO_SOCKET_IFNAME") or not _address(own).startswith("127."):
        return
    addresses = [_address(peer) for peer in peers if peer != own]
    if not (reachable := [address for address in addresses if address and not address.startswith("127.")]):
        return  # all of them are on this machine
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route, suppress(OSError):
        route.connect((reachable[0], 9))  # sends nothing
        for _, name in socket.if_nameindex():
            if _interface_address(name) == route.getsockname()[0]:
                os.environ["GLOO_SOCKET_IFNAME"] = name
                return
    raise UserError(
        f"{own}: this node's name stands for a loopback address, where others do not reach it, and no interface "
        f"that reaches {reachable[0]} was found; mend /etc/hosts, or set GLOO_SOCKET_IFNAME (in a profile: environment)"
    )


def check_known(host: str) -> None:
    """Raises UserError if this machine does not know a host's name: connecting would be tried for minutes."""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise UserError(
            f"{host}: {socket.gethostname()} does not know this node's name ({error}); in a container, bind the host's "
            "/etc/hosts and /etc/resolv.conf"
        ) from error


def _address(host: str) -> str:
    """The IPv4 address of a host; empty if it has none."""
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def _interface_address(name: str) -> str:
    """The IPv4 address of a network interface; empty if it has none."""
    siocgifaddr = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, suppress(OSError):
        answer = fcntl.ioctl(any_socket.fileno(), siocgifaddr, struct.pack("256s", name.encode()))
        return socket.inet_ntoa(answer[20:24])
    return ""
