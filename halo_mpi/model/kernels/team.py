"""Threads that compute one call together, without the GIL: each runs the whole call on its part, and they meet between steps.

    leader    announce -> meet -> ... -> meet -> returns         the thread that Python called
    others    await_call -> meet -> ... -> meet -> await_call    threads in compiled code all the time

Who waits spins at first: a step takes microseconds, and so must the meeting. Later it gives its core to others, and who had no
call for milliseconds sleeps until one comes (futex(2), Linux).
"""

import platform
import threading
from functools import cache

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from halo_mpi.model.kernels.jit import entry, step
from halo_mpi.model.kernels.tiles import aligned_bytes
from halo_mpi.model.kernels.vectors import compiled, words_at

SPINS = 200  # some microseconds, as long as a step may take the others longer
YIELDS = 5000  # some milliseconds, the time that a sync takes
LINE_WORDS = 8  # of a cache line
CALLS, ARRIVED, SLEEPERS, JOB = (LINE_WORDS * line for line in range(4))  # words of a team's board
BOARD_WORDS = LINE_WORDS * 5
QUIT = 0
FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine())  # number of the system call
WAIT, WAKE, EVERYBODY = 128, 129, 2**31 - 1  # both private to the process
PAUSE = {"x86_64": ("llvm.x86.sse2.pause", []), "aarch64": ("llvm.aarch64.hint", [1])}.get(platform.machine())


def supported() -> bool:
    return FUTEX is not None and platform.system() == "Linux"


def _place(lanes, address):
    return lanes.builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def add_to(typing, address, number):
    """Add to a word that others see; what it was before."""

    def emit(lanes, address, number):
        return lanes.builder.atomic_rmw("add", _place(lanes, address), number, "seq_cst")

    return compiled(emit, 2, types.int64)


@intrinsic
def seen_at(typing, address):
    """A word that others write; what they wrote before it is seen as well."""

    def emit(lanes, address):
        return lanes.builder.load_atomic(_place(lanes, address), "seq_cst", 8)

    return compiled(emit, 1, types.int64)


@intrinsic
def pause(typing):
    """Let the core rest for a moment."""

    def emit(lanes):
        if PAUSE:
            name, numbers = PAUSE
            function = ir.FunctionType(ir.VoidType(), [ir.IntType(32)] * len(numbers))
            arguments = [ir.IntType(32)(number) for number in numbers]
            lanes.builder.call(cgutils.get_or_insert_function(lanes.builder.module, function, name), arguments)

    return compiled(emit, 0)


@intrinsic
def give_way(typing):
    """Let another thread have the core, if one wants it."""

    def emit(lanes):
        function = ir.FunctionType(ir.IntType(32), [])
        lanes.builder.call(cgutils.get_or_insert_function(lanes.builder.module, function, "sched_yield"), [])

    return compiled(emit, 0)


@intrinsic
def futex(typing, address, operation, number):
    """WAIT while the word there is `number`, or WAKE so many threads."""

    def emit(lanes, address, operation, number):
        word = ir.IntType(64)
        function = cgutils.get_or_insert_function(lanes.builder.module, ir.FunctionType(word, [word] * 5), "syscall")
        lanes.builder.call(function, [word(FUTEX or 0), address, operation, number, word(0)])

    return compiled(emit, 3)


@step
def meet(board, threads):
    """Wait until all threads are here."""
    if threads == 1:
        return
    arrived = board + 8 * ARRIVED
    everybody = (add_to(arrived, 1) // threads + 1) * threads
    spins = 0
    while seen_at(arrived) < everybody:
        spins += 1
        if spins < SPINS:
            pause()
        else:
            give_way()


@intrinsic
def call_part(typing, function, data, work, x, rows, position, result, thread):
    """Call a part by its address."""

    def emit(lanes, function, *values):
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        lanes.builder.call(lanes.builder.inttoptr(function, kind.as_pointer()), values)

    return compiled(emit, 8)


@step
def announce(board, function, data, work, x, rows, position, result):
    """Give all others a job: a part's address, and what it takes."""
    job = carray(words_at(board + 8 * JOB), LINE_WORDS)
    job[0], job[1], job[2], job[3] = function, data, work, x
    job[4], job[5], job[6] = rows, position, result
    add_to(board + 8 * CALLS, 1)
    if seen_at(board + 8 * SLEEPERS):
        futex(board + 8 * CALLS, WAKE, EVERYBODY)


@entry
def run(board, threads, function, data, work, x, columns, position, result, result_columns):
    """Compute a part on all threads: result [T, result columns] of x [T, columns]."""
    if x.shape[1] != columns or result.shape[1] != result_columns or len(x) != len(result):
        raise ValueError("input or result has another shape than the weights")
    rows, source, target = len(x), x.ctypes.data, result.ctypes.data
    if threads > 1:
        announce(board, function, data, work, source, rows, position, target)
    call_part(function, data, work, source, rows, position, target, 0)


@entry
def serve(board, thread):
    """Take part in all calls of a team until it is told to quit."""
    job, calls = carray(words_at(board + 8 * JOB), LINE_WORDS), 0
    while True:
        calls = await_call(board, calls)
        if job[0] == QUIT:
            return
        call_part(job[0], job[1], job[2], job[3], job[4], job[5], job[6], thread)


@entry
def dismiss(board):
    """Tell all others to quit."""
    announce(board, QUIT, 0, 0, 0, 0, 0, 0)


@step
def await_call(board, calls):
    """Wait until there was another call than these; how many there were."""
    spins, now = 0, seen_at(board + 8 * CALLS)
    while now == calls:
        spins += 1
        if spins < SPINS:
            pause()
        elif spins < SPINS + YIELDS:
            give_way()
        else:
            add_to(board + 8 * SLEEPERS, 1)
            futex(board + 8 * CALLS, WAIT, calls % 2**32)
            add_to(board + 8 * SLEEPERS, -1)
        now = seen_at(board + 8 * CALLS)
    return now


@step
def own(count, thread, threads):
    """First and last + 1 of the things that a thread does."""
    return count * thread // threads, count * (thread + 1) // threads


class Team:
    """So many threads, the caller's own included."""

    def __init__(self, threads: int):
        prepare()
        self._memory = aligned_bytes(8 * BOARD_WORDS)
        self.board, self.threads = self._memory.ctypes.data, threads if supported() else 1
        for thread in range(1, self.threads):
            serving = threading.Thread(target=_serve, args=(self._memory, thread), daemon=True, name=f"kernels-{thread}")
            serving.start()

    def run(
        self, function: int, data: int, work: int, x: np.ndarray, position: int, result: np.ndarray, columns: int, made: int
    ) -> None:
        """Compute a part, given by its address, on all threads: result [T, made] of x [T, columns]; the rest is its arguments."""
        run(self.board, self.threads, function, data, work, x, columns, position, result, made)

    def __del__(self):
        if self.threads > 1:
            dismiss(self.board)


def _serve(memory: np.ndarray, thread: int) -> None:
    """`memory`: of the board, kept alive by this thread."""
    serve(memory.ctypes.data, thread)


@cache
def prepare() -> None:
    """Compile the entries, or take them from the disk, for the only types that they accept from then on."""
    word, rows = types.int64, types.float32[:, ::1]
    signatures = {run: [word] * 5 + [rows, word, word, rows, word], serve: [word] * 2, dismiss: [word]}
    for function, signature in signatures.items():
        function.compile(tuple(signature))
        function.disable_compile()
