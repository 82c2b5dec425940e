"""Several processes as one run: how they meet, tell each other things, and end together when one of them dies.

JAX's coordination service, in process 0, hears from every process now and then. When one of them has died, or process 0
has, a collective fails at once (gloo, on CPUs) or the service notices within the time limit; what it does then is to
abort the process it runs in. Either way the last line of every process left says what happened and how to go on.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax._src.distributed import global_state  # the client of the coordination service has no public name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnres_jax.errors import UserError

T = TypeVar("T")

LOST = re.compile(r"gloo|nccl|coordination ?service|connection (closed|reset)|socket closed", re.IGNORECASE)
"""In the message of a failed collective, or of a save that waited for all: another process could not be reached."""
DAY = 24 * 3600 * 1000
"""In milliseconds: what to wait for an answer at most. Who dies meanwhile is noticed by the service long before."""

_HANDLERS: list[Any] = []  # C handlers of signals, which outlive the frame that set them
_NUMBERS = itertools.count()  # every process asks the same questions in the same order


class ProcessError(UserError):
    """Flags that make no group of processes, or one that does not come about."""


class DeadProcessError(UserError):
    """Another process of the run died or could not be reached."""

    exit_code = 1


@dataclasses.dataclass(frozen=True)
class Group:
    """How this process finds the others."""

    coordinator: str | None
    """host:port of process 0; None: JAX asks the cluster it runs in."""
    num_processes: int | None
    process_id: int | None


def define_flags() -> Callable[[], Group | None]:
    """Adds the flags to the command line; what it returns reads them, None being a run of one process.

    Raises (when read):
      ProcessError: if they contradict each other.
    """
    flags.DEFINE_string("coordinator", None, "Several processes: host:port of process 0, the same in all.")
    flags.DEFINE_integer("num_processes", None, "Several processes: how many.")
    flags.DEFINE_integer("process_id", None, "Several processes: which one this is, from 0.")
    flags.DEFINE_bool("distributed", False, "Several processes: ask Slurm, Kubernetes, Cloud TPU or Open MPI.")
    names = [*(field.name for field in dataclasses.fields(Group)), "distributed"]
    return lambda: group_of(*(getattr(flags.FLAGS, name) for name in names))


def group_of(
    coordinator: str | None, num_processes: int | None, process_id: int | None, distributed: bool = False
) -> Group | None:
    """The group that flags of these values describe; None: one process.

    Raises:
      ProcessError: if they contradict each other.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    shown = " ".join(f"--{name}={value}" for name, value in given.items() if value is not None)
    if distributed:
        if shown:
            raise ProcessError(f"--distributed finds the processes by itself: leave out {shown}, or --distributed")
        return Group(None, None, None)
    if len(missing) == len(given):
        return None
    if missing:
        raise ProcessError(f"{shown} alone names no group of processes: add {' and '.join(missing)}")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ProcessError(f"--coordinator={coordinator} is no host:port, as in 10.0.0.1:1234")
    if num_processes < 1:
        raise ProcessError(f"--num_processes={num_processes} must be 1 or more")
    if not 0 <= process_id < num_processes:
        raise ProcessError(f"--process_id={process_id} is not one of 0 to {num_processes - 1} (--num_processes)")
    return Group(coordinator, num_processes, process_id)


@contextlib.contextmanager
def joined(group: Group | None, timeout: int) -> Iterator[None]:
    """Inside, the group's processes are one run, and JAX's devices those of all; enter it before JAX runs anything.

    Leaving it waits for the others, and then each is by itself. An error that a user can mend is one that all have;
    with any other this process ends without waiting, so that the others notice.

    Args:
      group: None: a run of one process, and nothing happens.
      timeout: `training.process_timeout`, in seconds.

    Raises:
      ProcessError: if the processes do not meet in time, or JAX knows no cluster here.
      DeadProcessError: if another process dies or cannot be reached. What cannot be caught ends with the same line and
        exit code.
    """
    if group is None:
        yield
        return
    with _last_words() as words:
        _meet(group, timeout, words)
        words.say(str(_dead(timeout)), DeadProcessError.exit_code)
        try:
            yield
            jax.distributed.shutdown()
        except UserError:
            raise
        except BaseException as error:
            atexit.register(_leave, DeadProcessError.exit_code)  # before JAX's own, which waits for the others
            words.leave_stderr_to_python()
            if seen := _lost(error):
                raise _dead(timeout, seen) from None
            raise


def one_first(f: Callable[[], T]) -> T:
    """`f()` in process 0, and when that is done in the others; each gets its own result.

    Raises:
      UserError: in every process, if process 0 raises one; its line and exit code.
    """
    if jax.process_count() == 1:
        return f()
    key = f"attnres_jax/first/{next(_NUMBERS)}"
    if jax.process_index() != 0:
        verdict = json.loads(global_state.client.blocking_key_value_get(key, DAY))
        if verdict:
            error = UserError(verdict[0])
            error.exit_code = verdict[1]
            raise error
        return f()
    try:
        result = f()
    except UserError as error:
        global_state.client.key_value_set(key, json.dumps([str(error), error.exit_code]))
        raise
    global_state.client.key_value_set(key, json.dumps(None))
    return result


def gather(value: str) -> list[str]:
    """The value of every process, in no order; waits for all of them."""
    if jax.process_count() == 1:
        return [value]
    key = f"attnres_jax/gather/{next(_NUMBERS)}"
    global_state.client.key_value_set(f"{key}/{jax.process_index()}", value)
    global_state.client.wait_at_barrier(key, DAY)
    return [value for _, value in global_state.client.key_value_dir_get(key)]


def require_same(what: str, value: str) -> None:
    """Compares a value over all processes.

    Raises:
      ProcessError: in every process, if they differ; `what` says what they are and what to do.
    """
    values = sorted(set(gather(value)))
    if len(values) > 1:
        raise ProcessError(f"the processes differ in {what}: {', '.join(values)}")


class AnyProcess:
    """Whether a flag is up anywhere, known to all at the same call, at no wait.

    The answer is that of the call before, which by then is there: the flags of a step are summed up by the devices
    behind the step. In a run of one process it is the flag.
    """

    def __init__(self, mesh: Mesh):
        self._place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before: Any = False

    def __call__(self, flag: bool) -> bool:
        """Whether it was up in any process at the last call."""
        if jax.process_count() == 1:
            return flag
        before = bool(self._before)
        size = self._place.mesh.size
        flags = jax.make_array_from_callback((size,), self._place, lambda _: np.array([flag]))
        self._before = self._any(flags)
        return before


@dataclasses.dataclass
class _Words:
    """What to say, and with what exit code, if JAX's coordination service aborts this process."""

    stderr: int
    line: bytes = b""
    code: int = 1

    def say(self, line: str, code: int) -> None:
        self.line, self.code = f"{sys.argv[0]}: {line}\n".encode(), code

    def leave_stderr_to_python(self) -> None:
        """From here on what the threads of JAX's libraries print, as they lose the others too, is not seen."""
        sys.stderr = os.fdopen(os.dup(self.stderr), "w", buffering=1)
        _close_stderr()


@contextlib.contextmanager
def _last_words() -> Iterator[_Words]:
    """Inside, an abort of the process ends with the words instead of a core dump.

    The service calls `abort` in a thread of its own, where Python's signal handlers do not run: a C handler does.
    """
    words = _Words(stderr=os.dup(2))

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def speak(_: int) -> None:
        _close_stderr()
        os.write(words.stderr, words.line)
        os._exit(words.code)

    _HANDLERS.append(speak)
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    before = set_handler(signal.SIGABRT, ctypes.cast(speak, ctypes.c_void_p))
    yield words
    set_handler(signal.SIGABRT, before)  # an error leaves it: JAX waits for the others when the process ends
    os.close(words.stderr)


def _meet(group: Group, timeout: int, words: _Words) -> None:
    """`jax.distributed.initialize`, whose failures are one line."""
    if group.coordinator is None:
        failure = f"--distributed: the processes did not meet within {timeout} s (training.process_timeout)"
    else:
        failure = (
            f"process {group.process_id} of {group.num_processes} did not meet the others at "
            f"--coordinator={group.coordinator} within {timeout} s (training.process_timeout); start each of the ids "
            f"0 to {group.num_processes - 1} once, with the same --coordinator and --num_processes"
        )
    words.say(failure, ProcessError.exit_code)
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself
    try:
        with _stderr_closed(words.stderr):  # to a stack trace
            jax.distributed.initialize(
                group.coordinator,
                group.num_processes,
                group.process_id,
                cluster_detection_method=None if group.coordinator is None else "deactivate",
                initialization_timeout=timeout,
                heartbeat_timeout_seconds=timeout,
                shutdown_timeout_seconds=timeout,
            )
    except ValueError as error:
        if group.coordinator is not None:
            raise
        raise ProcessError(
            f"--distributed: JAX finds no cluster here ({error}); in the place of it give "
            "--coordinator=host:port --num_processes=N --process_id=I"
        ) from None
    except (jax.errors.JaxRuntimeError, OSError) as error:
        raise ProcessError(f"{failure} ({' '.join(str(error).split())[:150]})") from None


def _close_stderr() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


@contextlib.contextmanager
def _stderr_closed(saved: int) -> Iterator[None]:
    _close_stderr()
    try:
        yield
    finally:
        os.dup2(saved, 2)


def _lost(error: BaseException | None) -> str:
    """What says that another process could not be reached, in the error or in one that it arose from; else ""."""
    while error is not None:
        if LOST.search(str(error)):
            return " ".join(str(error).split())[:150]
        error = error.__context__  # as when the save under way fails too while the first error closes it
    return ""


def _dead(timeout: int, seen: str = "") -> DeadProcessError:
    own, count = jax.process_index(), jax.process_count()
    return DeadProcessError(
        f"process {own} of {count} ends because another one died or could not be reached for {timeout} s "
        f"(training.process_timeout){f': {seen}' if seen else ''}; see its own last lines; the same command in all "
        "processes resumes from the newest checkpoint"
    )


def _leave(code: int) -> None:
    """Ends the process at once, whatever else would be done at its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
