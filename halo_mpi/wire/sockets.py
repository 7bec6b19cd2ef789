"""The TCP connections of the MPI library, tuned by the process that owns them: no root rights.

Linux repairs a lost packet with nothing behind it only after a timeout of at least 200 ms, doubled each time. A round trip of
1.1 kB at 2 % loss takes 9.05 ms on the average, and 0.62 ms with these options (see the design's measurements).
"""

import os
import socket
import stat
import sys
from collections.abc import Iterator

import psutil

TCP_USER_TIMEOUT = 18  # ms until Linux gives a connection up; rto_max would shrink that from 15 minutes to 14 s
TCP_THIN_LINEAR_TIMEOUTS = 16  # do not double the timeout while few packets are in flight; Linux 2.6.34
TCP_RTO_MAX_MS = 44  # Linux 6.15
TCP_RTO_MIN_US = 45  # Linux 6.15
OPTIONS = {
    "user_timeout": (TCP_USER_TIMEOUT, 900_000),
    "thin_linear_timeouts": (TCP_THIN_LINEAR_TIMEOUTS, 1),
    "rto_max": (TCP_RTO_MAX_MS, 1000),
    "rto_min": (TCP_RTO_MIN_US, 5000),
}
TCP_INFO = 11
AGAIN_AT, SENT_AT, DSACKS_AT = 100, 156, 216  # bytes of struct tcp_info: tcpi_total_retrans, _data_segs_out, _dsack_dups
COPIES = {"auto": (2, 4), "1": (1, 1), "2": (2, 2), "4": (4, 4)}  # of a small message, and connections: at first, at most
NEW_OPTIONS = ("rto_max", "rto_min")  # what kernels before 6.15 refuse


def own_addresses() -> list[str]:
    """The IP addresses of this host, but for loopback."""
    families = (socket.AF_INET, socket.AF_INET6)
    addresses = [a.address.partition("%")[0] for each in psutil.net_if_addrs().values() for a in each if a.family in families]
    return sorted(address for address in addresses if not address.startswith("127.") and address != "::1")


def ask_for_connections(arguments: list[str]) -> int:
    """Let Open MPI open as many TCP connections between every two hosts as `--copies` among the arguments needs, to be used by turns;
    how many these are.

    Before MPI starts; others ignore it. All are made to look as quick as the first, or they would only carry parts of large messages.
    """
    words = [part for word in arguments for part in (word.split("=") if word.startswith("--copies=") else [word])]
    wanted = dict(zip(words, words[1:])).get("--copies", "auto")
    count = COPIES.get(wanted, COPIES["auto"])[1]
    if count == 1:
        return count
    os.environ.setdefault("OMPI_MCA_btl_tcp_links", str(count))
    for interface in psutil.net_if_addrs():
        for further in range(1, count):
            os.environ.setdefault(f"OMPI_MCA_btl_tcp_latency_{interface}:{further}", "100")  # us, the default of the first
    return count


def count_connections(peer: set[str]) -> int:
    """How many TCP connections this process has to a peer (its IP addresses). Each must have been used before."""
    count = 0
    for connection in _connections(peer):
        connection.close()
        count += 1
    return count


def tune_sockets(peers: set[str], old_kernel: bool = False) -> dict[str, bool]:
    """Tune this process's TCP connections to the `peers` (IP addresses); which options were accepted, {} without connections.

    MPI must have opened them before. `old_kernel`: leave out what kernels before 6.15 refuse, as if this one did.
    """
    accepted: dict[str, bool] = {}
    for connection in _connections(peers):
        with connection:
            for name, (option, value) in OPTIONS.items():
                accepted[name] = (
                    accepted.get(name, True) and not (old_kernel and name in NEW_OPTIONS) and _set(connection, option, value)
                )
    return accepted


def accepted_options() -> dict[str, bool]:
    """Which of the options this kernel accepts, by trying them on a connection within this process."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=5) as connection,
    ):
        return {name: _set(connection, option, value) for name, (option, value) in OPTIONS.items()}


def sent_segments(peer: set[str]) -> dict[str, tuple[int, int]]:
    """Of this process's TCP connections to a peer (its IP addresses), by their ports: segments with data that were sent, and how many
    of these were sent again because a packet was lost. What the receiver told was sent again for nothing does not count. Empty where
    that is not told (before Linux 4.18).
    """
    found = {}
    for connection in _connections(peer):
        with connection:
            try:
                told = connection.getsockopt(socket.IPPROTO_TCP, TCP_INFO, DSACKS_AT + 4)
                ports = f"{connection.getsockname()[1]}-{connection.getpeername()[1]}"
            except OSError:
                continue
        if len(told) == DSACKS_AT + 4:
            sent, again, needless = (int.from_bytes(told[at : at + 4], sys.byteorder) for at in (SENT_AT, AGAIN_AT, DSACKS_AT))
            found[ports] = sent, max(0, again - needless)
    return found


def _set(connection: socket.socket, option: int, value: int) -> bool:
    try:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    except OSError:
        return False
    return True


def _connections(peers: set[str]) -> Iterator[socket.socket]:
    """Duplicates of the connected TCP sockets among this process's file descriptors; none where there is no /proc.

    To be closed one by one: a duplicate that stays open would be met again if it has the number that the listing itself had.
    """
    try:
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return
    for descriptor in descriptors:
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            continue  # the descriptor of the listing itself
        try:
            is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM
            if is_tcp and _plain(connection.getpeername()[0]) in peers:
                yield connection
                continue
        except OSError:
            pass  # listening, not connected
        connection.close()


def _plain(address: str) -> str:
    return address.partition("%")[0].removeprefix("::ffff:")
