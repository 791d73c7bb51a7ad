"""The hosts of a JAX run: how they find each other, and what they tell each other between steps.

`JAX_COORDINATOR_ADDRESS`, `JAX_PROCESS_COUNT` and `JAX_PROCESS_INDEX` join them; on a cloud pod, under Slurm or MPI,
JAX finds the others itself, and `JAX_COORDINATOR_ADDRESS=auto` tells it to look. JAX reads only the first of the three
variables by itself.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from neuroweave.training.configuration import TrainConfiguration
from neuroweave.training.safe_checkpoints import one_line

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_COUNT", "JAX_PROCESS_INDEX"
BIND_ADDRESS = "JAX_COORDINATOR_BIND_ADDRESS"  # JAX's own: where the first process listens, instead
TIMEOUT = "JAX_INITIALIZATION_TIMEOUT"  # ours: seconds that a host waits for the others
DEFAULT_TIMEOUT = 300
# Number of processes, and the variable by which JAX knows the launcher that started them.
LAUNCHERS = {"SLURM_NTASKS": "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE": "OMPI_MCA_orte_hnp_uri"}
POD_HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
A_DAY = 24 * 3600
MOST = {COUNT: 1_000_000, INDEX: 1_000_000, TIMEOUT: 7 * A_DAY}  # beyond, JAX's counters overflow


def join_processes(
    environment: Mapping[str, str] = os.environ, *, tell: Callable[[str], object] = lambda line: None
) -> None:
    """Join the other hosts, if the environment names any; to be called before JAX is used. `tell` is told of a wait.

    Raises ValueError for variables that are incomplete or wrong, and for a coordinator that does not answer.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: environment[name] for name in (ADDRESS, COUNT, INDEX) if environment.get(name)}
    if not given and not of_a_pod(environment):
        return
    if not given or given == {ADDRESS: "auto"}:
        keep_stdout()
        os.environ.pop(ADDRESS, None)  # JAX would take it for an address
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"JAX cannot tell which hosts belong together here ({one_line(error)}); set {ADDRESS}, {COUNT} and "
                f"{INDEX} on each"
            ) from error
        return
    if missing := [name for name in (ADDRESS, COUNT, INDEX) if name not in given]:
        raise ValueError(f"{', '.join(given)}: set, but not {', '.join(missing)}; hosts are joined by all three")
    count, index = (whole_number(name, given[name]) for name in (COUNT, INDEX))
    timeout = whole_number(TIMEOUT, environment.get(TIMEOUT) or str(DEFAULT_TIMEOUT))
    if timeout < 1:
        raise ValueError(f"{TIMEOUT}={timeout}: give the seconds that a host waits for the others, at least 1")
    if count < 1 or index >= count:
        raise ValueError(
            f"{INDEX}={index} and {COUNT}={count}: the {count} processes have the indices 0 to {count - 1}"
        )
    if count == 1:
        return
    check_address(given[ADDRESS])
    if index == 0:
        check_can_listen(given[ADDRESS], environment.get(BIND_ADDRESS))
    keep_stdout()
    if index == 0:  # JAX itself ends the process, without a word of this, when the others never come
        tell(f"waiting at {given[ADDRESS]} for {count - 1} of {count} processes, at most {timeout} s ({TIMEOUT})")
    if index:
        wait_for_coordinator(given[ADDRESS], timeout)
    try:
        jax.distributed.initialize(
            coordinator_address=given[ADDRESS], num_processes=count, process_id=index, initialization_timeout=timeout
        )
    except RuntimeError as error:
        raise ValueError(
            f"{ADDRESS}={given[ADDRESS]}: the {count} processes did not come together within {timeout} s "
            f"({one_line(error)}); is one started on each host with {INDEX} 0 to {count - 1}?"
        ) from error


def keep_stdout() -> None:
    """Keep what the libraries below Python print (gloo: a line a process) out of stdout: it goes to stderr."""
    try:
        ours = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed
        return
    out = sys.stdout
    if out is sys.__stdout__ and out is not None:
        out.flush()
        sys.stdout = os.fdopen(ours, "w", encoding=out.encoding, errors=out.errors)


def of_a_pod(environment: Mapping[str, str]) -> bool:
    """Whether a launcher or a TPU pod says that there are several hosts."""
    several = any("," in environment.get(name, "") for name in POD_HOSTS)
    if several or environment.get("MEGASCALE_NUM_SLICES"):
        return True
    sizes = [environment.get(size, "1") for size, sign in LAUNCHERS.items() if environment.get(sign)]
    return any(size.isdigit() and int(size) > 1 for size in sizes)


def whole_number(name: str, text: str) -> int:
    if not is_number(text):
        raise ValueError(f"{name}={text!r}: a whole number was expected")
    if len(text) > 18 or int(text) > MOST[name]:
        raise ValueError(f"{name}={text}: a whole number up to {MOST[name]} was expected")
    return int(text)


def is_number(text: str) -> bool:
    """Whether these are digits that int() reads; "²" is a digit too."""
    return text.isascii() and text.isdigit()


def check_address(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not is_number(port):
        raise ValueError(f"{ADDRESS}={address!r}: HOST:PORT was expected, such as 10.0.0.1:1234")
    if len(port) > 5 or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{ADDRESS}={address!r}: ports are 1 to 65535")


def check_can_listen(address: str, bound: str | None = None) -> None:
    """Raise ValueError where the first process cannot listen at its address: JAX would crash, or wait in vain.

    `bound`: the address where it listens instead, of a host that the others reach under another one. By itself JAX
    listens at the port on all interfaces.
    """
    host, _, port = (bound or address).rpartition(":")
    if not host or not is_number(port):
        raise ValueError(f"{BIND_ADDRESS}={bound!r}: HOST:PORT was expected, such as 10.0.0.1:1234")
    for name in (host.strip("[]"),) if bound else (host.strip("[]"), None):
        errors = errors_of_listening(name, int(port))
        taken = next((error for error in errors if error and error.errno == errno.EADDRINUSE), None)
        if taken is None and (name is None or not all(errors)):
            continue
        error = taken or next(error for error in errors if error)
        strange = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        way_out = "another process has this port; choose another" if taken else "choose another"
        if strange:
            way_out = f"give an address of this machine (where others know it by another one, set {BIND_ADDRESS})"
        raise ValueError(
            f"{ADDRESS}={address}: the process with {INDEX}=0 cannot listen at {name or 'every interface'}, port "
            f"{port} ({one_line(error)}); {way_out}"
        )


def errors_of_listening(host: str | None, port: int) -> list[OSError | None]:
    """What happens when each address of a host is bound; None: of every interface."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        return [error if isinstance(error, OSError) else socket.gaierror(str(error))]
    errors: list[OSError | None] = []
    for family, kind, protocol, _, place in found:
        try:
            with socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections do not count
                if family == socket.AF_INET6:
                    tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                tried.bind(place)
            errors.append(None)
        except OSError as error:
            errors.append(error)
    return errors


def wait_for_coordinator(address: str, timeout: int) -> None:
    """Return when something listens there. JAX would end the process without a word of which address it was."""
    host, _, port = address.rpartition(":")
    until, reason = time.monotonic() + timeout, ""
    while time.monotonic() < until:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=min(5, timeout)):
                return
        except OSError as error:
            reason = str(error)
            time.sleep(0.2)
    raise ValueError(
        f"{ADDRESS}={address}: no coordinator answered within {timeout} s ({reason}); is the process with {INDEX}=0 "
        f"running there, and does its firewall let this port through? {TIMEOUT} sets the seconds"
    )


# ------------------------------------------------------------------------------------------------------ agreement


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_ahead() -> Iterator[None]:
    """The first process runs the block alone, then all others; when it fails on one, the others are told."""
    if jax.process_count() == 1:
        yield
        return
    if is_first():
        problem: str | None = None
        try:
            yield
        except BaseException as error:
            problem = str(error) or type(error).__name__
            raise
        finally:
            ocp.multihost.sync_global_processes("first ahead", timeout=A_DAY)
            from_all(problem)
        ocp.multihost.sync_global_processes("all others", timeout=A_DAY)
        check_together(None)
        return
    ocp.multihost.sync_global_processes("first ahead", timeout=A_DAY)  # a collective of devices would not wait so long
    problem = from_all(None)[0]
    if problem is not None:
        raise ValueError(f"process 0 failed: {problem}")
    try:
        yield
    except BaseException as error:
        problem = str(error) or type(error).__name__
        raise
    finally:
        ocp.multihost.sync_global_processes("all others", timeout=A_DAY)
        every = from_all(problem)
    for host, told in enumerate(every):
        if told is not None:
            raise ValueError(f"process {host} failed: {told}")


def from_all(value: Any) -> list[Any]:
    """What each process hands in (JSON values), in order; a collective."""
    if jax.process_count() == 1:
        return [value]
    raw = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray([len(raw)], dtype=np.int32)).reshape(-1)
    padded = np.zeros(int(sizes.max()), dtype=np.uint8)
    padded[: len(raw)] = raw
    every = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(bytes(row[:size])) for row, size in zip(every, sizes, strict=True)]


def anybody(asked: bool) -> bool:
    """Whether any process says so; a collective."""
    return any(from_all(asked))


def check_devices(owners: Sequence[int]) -> None:
    """Raise ValueError unless all hosts have equally many devices. `owners`: the process of each device."""
    counts = Counter(owners)
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{counts[host]} on host {host}" for host in sorted(counts))
        raise ValueError(
            f"the hosts have different numbers of devices ({said}); give all of them equally many (XLA_FLAGS, "
            f"CUDA_VISIBLE_DEVICES, JAX_PLATFORMS)"
        )


def check_together(problem: str | None) -> None:
    """Raise ValueError on all hosts when one of them has a problem; a collective."""
    for host, told in enumerate(from_all(problem)):
        if told is not None:
            raise ValueError(told if host == jax.process_index() else f"process {host} failed: {told}")


def check_agreement(configuration: TrainConfiguration, *, resume: bool | None = None, dry_run: bool = False) -> None:
    """Raise ValueError, on all hosts, when they were started with other settings, naming those."""
    check_devices([device.process_index for device in jax.devices()])
    mine = configuration.what_all_hosts_share() | {"--resume": resume, "--dry-run": dry_run}
    every = from_all(mine)
    other = sorted({name for each in every for name in {*each, *every[0]} if each.get(name) != every[0].get(name)})
    if other:
        said = "; ".join(
            f"{name} is {', '.join(f'{each.get(name)!r} on host {i}' for i, each in enumerate(every))}"
            for name in other[:3]
        )
        raise ValueError(f"the hosts were started with different settings ({said}); give all of them the same file")
