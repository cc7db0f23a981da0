"""Limits of control groups, in the files in which the kernel shows them."""

import os
import socket

import pytest

from gowide_dist import machine
from gowide_dist.data.memory import available_memory_bytes
from gowide_dist.environment import describe_environment
from gowide_dist.errors import UserError
from gowide_dist.insight import doctor
from gowide_dist.launch.local import default_num_processes

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes /proc/self/cgroup and files of /sys/fs/cgroup, for a process bound to 64 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "HIERARCHIES", tmp_path / "sys")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def write(own, **files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "sys" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


V1_TWO_CORES = {"cpu.cfs_quota_us": "200000\n", "cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {}, 64),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "800000 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "1000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 64),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "25000 5000\n"}, 5),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "800000 100000\n"}, 3),
        ("0::/docker/of-the-host\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/../..\n", {"cpu.max": "400000 100000\n"}, 4),
        ("4:cpu,cpuacct:/x\n", {f"cpu,cpuacct/x/{name}": text for name, text in V1_TWO_CORES.items()}, 2),
        ("4:cpu,cpuacct:/x\n", {f"cpu/{name}": text for name, text in V1_TWO_CORES.items()}, 2),
        ("3:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ("3:cpuset:/\n0::/me\n", {"unified/me/cpu.max": "600000 100000\n"}, 6),
        ("3:cpuacct:/\n", {f"cpuacct/{name}": text for name, text in V1_TWO_CORES.items()}, 64),
    ],
)
def test_a_quota_counts_wherever_cores_are_counted(groups, own, files, cores):
    groups(own, **files)
    assert machine.num_cores() == cores
    assert default_num_processes() == max(1, cores // 2)
    assert describe_environment([], 1)["cpus"] == cores
    assert doctor.check_cpus().startswith(f"{cores} cores, ")


def test_a_machine_without_control_groups(groups):
    assert machine.num_cores() == 64
    assert available_memory_bytes() > 0


@pytest.mark.parametrize(
    ("own", "folder", "limit", "used", "cached"),
    [
        ("0::/job\n", "job", "memory.max", "memory.current", ["inactive_file", "active_file"]),
        ("5:memory:/job\n", "memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes",
         ["total_inactive_file", "total_active_file"]),
    ],
)  # fmt: skip
def test_memory_that_a_group_leaves(groups, own, folder, limit, used, cached):
    stat = "".join(f"{name} {GIB // 64}\n" for name in ["anon", *cached])
    files = {limit: f"{GIB // 4}\n", used: f"{GIB // 8}\n", "memory.stat": stat}
    groups(own, **{f"{folder}/{name}": text for name, text in files.items()})
    assert available_memory_bytes() == GIB // 4 - GIB // 8 + 2 * GIB // 64
    groups(own, **{f"{folder}/{limit}": "max\n"})
    assert available_memory_bytes() > GIB // 4


def test_a_name_that_nobody_knows():
    machine.check_known("localhost")
    with pytest.raises(UserError, match=r"node-7.invalid: .* does not know this node's name .*; in a container, bind"):
        machine.check_known("node-7.invalid")


def test_a_name_that_stands_for_loopback(monkeypatch):
    """As Debian's installer leaves it: peers would be told to connect to 127.0.1.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            route.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network interface but loopback")
        address = route.getsockname()[0]
    known = {socket.gethostname(): "127.0.1.1", "peer": "192.0.2.1", "local": "127.0.0.1", "nowhere": "255.255.255.255"}
    monkeypatch.setattr(socket, "gethostbyname", known.__getitem__)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    machine.mend_loopback([socket.gethostname(), "local"])
    assert "GLOO_SOCKET_IFNAME" not in os.environ, "all of them are on this machine"
    with pytest.raises(UserError, match="this node's name stands for a loopback address"):
        machine.mend_loopback(["nowhere"])
    machine.mend_loopback([socket.gethostname(), "local", "peer"])
    assert machine._interface_address(os.environ["GLOO_SOCKET_IFNAME"]) == address
