"""Calls to the system: commands, work inside a network namespace, switches of a network interface."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import threading
from pathlib import Path

NETNS = Path("/run/netns")
CLONE_NEWNET = 0x40000000
SIOCETHTOOL = 0x8946
# ETHTOOL_SGSO, SGRO, STSO of <linux/ethtool.h>: with them on, what a lab drops is a burst of up to 64 KiB, not a packet.
OFFLOADS = (0x24, 0x2C, 0x1F)


class LabError(Exception):
    """One line for the user: the lab cannot do what was asked."""


def call(*words: str, stdin: str = "") -> str:
    """What a command prints. It has a session of its own, so that Ctrl-C does not cut it short."""
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=60, start_new_session=True)
    except FileNotFoundError:
        raise LabError(f"{words[0]} is missing; install {PACKAGES.get(words[0], words[0])}") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(words)} does not end") from None
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise LabError(f"{' '.join(words)}: {reason}")
    return done.stdout


PACKAGES = {"ip": "iproute2", "tc": "iproute2", "nft": "nftables", "nsenter": "util-linux", "unshare": "util-linux"}


def require_root_and_tools() -> None:
    if os.geteuid() != 0:
        raise LabError("the lab makes network namespaces: run it as root (sudo)")
    for tool in ("ip", "tc", "nsenter", "unshare"):
        if shutil.which(tool) is None:
            raise LabError(f"{tool} is missing; install {PACKAGES[tool]}")


def inside(namespace: str, work):
    """What work() returns in a thread that stands in this network namespace. Sockets that it opens stay there."""
    result = []

    def stand_there():
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            with open(NETNS / namespace) as handle:
                if libc.setns(handle.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            result.append(work())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=stand_there)
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        raise LabError(f"in namespace {namespace}: {result[0]}") from result[0]
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def switch_offloads_off(interface: str) -> None:
    """Segmentation and receive offloads of an interface in the namespace of the calling thread."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        for offload in OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", offload, 0))
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
            try:
                fcntl.ioctl(handle, SIOCETHTOOL, request + bytes(16))
            except OSError as error:
                if error.errno != 95:  # EOPNOTSUPP: the interface has no such offload
                    raise


def set_kernel_value(name: str, value: int) -> None:
    """A value of /proc/sys, for the namespace of the calling thread."""
    Path(f"/proc/sys/{name}").write_text(str(value))


def pids_in(namespace: str) -> list[int]:
    """The processes that stand in a network namespace."""
    if not (NETNS / namespace).exists():
        return []
    return [int(pid) for pid in call("ip", "netns", "pids", namespace).split()]
