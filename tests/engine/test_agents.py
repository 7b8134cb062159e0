"""Several torchruns, each of which stands for a machine: processes, machines and the network between them die.

torchrun's rendezvous waits for seconds where it would for minutes; all else is as it would be.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from synco_fast.engine.distributed import name_of_start
from tests.command import call
from tests.conftest import REPOSITORY, SYNCO_FAST, environment
from tests.engine.ranks import Launched
from tests.engine.runs import differences, final_state, pretrain_command, rows

STEPS = 24
SETTINGS = ("checkpoint.every_steps=3", "trainer.stall_minutes=0.5")
FOREVER = "trainer.epochs=10000"
LONG = "trainer.epochs=20"
LONG_STEPS = 120
TIMES = "last_call_timeout=4,keep_alive_interval=1,keep_alive_max_attempt=5,read_timeout=20,close_timeout=5"
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # or a torchrun that is started later cannot join


class Agent(Launched):
    """A torchrun that is one of several, with one worker unless told otherwise."""

    def __init__(
        self, words: list[str], options: Sequence[str], extra: dict[str, str], inside: Sequence[str] = ()
    ) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval=0.1", *options]
        self.process = subprocess.Popen(
            [*inside, *torchrun, "-m", "synco_fast", *words[len(SYNCO_FAST) :]],
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
            env=environment() | extra,
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def worker(self) -> int:
        """Its one process, which is there."""
        (found,) = self.workers()
        return found

    def send(self, number: int) -> None:
        """A signal to the whole machine: torchrun and its processes."""
        workers = self.workers()
        for process in (self.process.pid, *workers):
            os.kill(process, number)

    def ends(self, seconds: float) -> tuple[int, str]:
        """Its exit code and all that it said; a failure where it is not over by then.

        torchrun's code is -6, not 1, where it ends while a thread of its own is in native code.
        """
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still there after {seconds:g} s: {''.join(self.said)[-3000:]}")
        return self.end()


class Cluster:
    """Machines of one run, by number from 1 on; the first has rank 0, unless it is gone."""

    def __init__(self, words: list[str]) -> None:
        self._words, self._port = words, free_port()
        self.agents: list[Agent] = []

    def rendezvous(self, number: int, machines: str, host: int = 1, restarts: int = 3, times: str = TIMES) -> list[str]:
        """Options of torchrun's own rendezvous, which one of the machines hosts."""
        return [
            f"--nnodes={machines}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=localhost:{self._port}",
            "--rdzv-id=run",
            f"--max-restarts={restarts}",
            f"--rdzv-conf=is_host={int(number == host)},{times}",
            f"--local-addr=127.0.0.{number}",
        ]

    def static(self, number: int, machines: str) -> list[str]:
        """Options that give each machine its number."""
        place = [f"--node-rank={number - 1}", "--master-addr=localhost", f"--master-port={self._port}"]
        return [f"--nnodes={machines}", *place, "--max-restarts=3"]

    def start(
        self,
        options: Sequence[str],
        processes: int = 1,
        extra: dict[str, str] | None = None,
        inside: Sequence[str] = (),
    ) -> Agent:
        agent = Agent(self._words, [*options, f"--nproc-per-node={processes}"], extra or {}, inside)
        self.agents.append(agent)
        return agent

    def close(self) -> None:
        """Whatever still runs is killed; what was stopped goes on for that."""
        for agent in self.agents:
            for number in (signal.SIGCONT, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    if agent.process.poll() is None:
                        agent.send(number)
            agent.process.wait()


@pytest.fixture
def cluster() -> Iterator[Callable[[list[str]], Cluster]]:
    """Makes clusters for a command, of which nothing is left after the test."""
    with contextlib.ExitStack() as stack:

        def make(words: list[str]) -> Cluster:
            made = Cluster(words)
            stack.callback(made.close)
            return made

        yield make


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def command(config: Path, data: Path, output: Path, *settings: str) -> list[str]:
    return pretrain_command(config, data, output, settings=(*SETTINGS, *settings))


@pytest.fixture(scope="module")
def undisturbed(config: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of two processes of one torchrun from start to end."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    code, text = Launched(command(config, images, output), 2).end()
    assert code == 0, text
    return output


def check_same(output: Path, undisturbed: Path) -> None:
    assert final_state(output)["step"] == STEPS
    assert differences(final_state(output), final_state(undisturbed)) == []
    assert rows(output) == rows(undisturbed)


def check_whole(output: Path, steps: int) -> None:
    """Each step has one row, none was left out."""
    assert final_state(output)["step"] == steps
    assert [row["step"] for row in rows(output)] == list(range(1, steps + 1))


def test_starts_that_share_a_store() -> None:
    """Each has a name of its own, whoever comes first, and processes of an earlier one are not waited for."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def name(rank: int, size: int, late: int | None = None, seconds: float = 30) -> str:
        store = TCPStore("127.0.0.1", server.port)
        store.set_timeout(timedelta(seconds=seconds))
        if rank == late:
            time.sleep(0.3)
        return name_of_start(store, rank, size, timedelta(seconds=seconds))

    found = set()
    with ThreadPoolExecutor(4) as pool:
        for late, size in ((0, 3), (1, 4), (0, 4), (2, 3)):
            names = set(pool.map(partial(name, size=size, late=late), range(size)))
            assert len(names) == 1
            found |= names
    assert len(found) == 4
    with pytest.raises(RuntimeError, match="timeout"):
        name(0, 2, seconds=0.3)
    with pytest.raises(RuntimeError, match=r"rank 0 has not answered within 0\.3 s"):
        name(1, 2, seconds=0.3)


@pytest.mark.parametrize("form", ["rendezvous", pytest.param("static", marks=pytest.mark.slow)])
def test_a_process_of_another_machine_is_killed(
    form: str, config: Path, images: Path, tmp_path: Path, undisturbed: Path, cluster: Callable[[list[str]], Cluster]
) -> None:
    """SIGKILL to it: both torchruns start their processes again, which end where undisturbed ones end."""
    made = cluster(command(config, images, tmp_path / "run"))
    first, second = (made.start(getattr(made, form)(number, "2")) for number in (1, 2))
    first.wait_for("step 1/")
    worker = second.worker()
    first.wait_for("step 8/")
    os.kill(worker, signal.SIGKILL)
    for agent in (first, second):
        code, text = agent.ends(120)
        assert code == 0, text
    assert "failed (exitcode: -9)" in "".join(second.said)
    check_same(tmp_path / "run", undisturbed)


def test_uneven_machines(config: Path, images: Path, tmp_path: Path, cluster: Callable[[list[str]], Cluster]) -> None:
    """One process on the first, two on the second: none of the three begins, and both machines say why."""
    settings = ("data.batch_size=12", "bn.group_size=2", "queue.size=60")
    made = cluster(command(config, images, tmp_path / "run", *settings))
    first = made.start(made.rendezvous(1, "2", restarts=0))
    second = made.start(made.rendezvous(2, "2", restarts=0), processes=2)
    for agent in (first, second):
        code, text = agent.ends(120)
        assert code != 0 and "error: the 3 processes cannot work together; start them alike" in text, text
        assert f"processes on the host: 1 on rank 0 (host {socket.gethostname()}), 2 on most" in text, text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_machine_is_lost(config: Path, images: Path, tmp_path: Path, cluster: Callable[[list[str]], Cluster]) -> None:
    """SIGKILL to a torchrun and its process, which had rank 0, with --nnodes=1:2: the other goes on alone from the last
    checkpoint."""
    made = cluster(command(config, images, tmp_path / "run", LONG))
    first, second = (made.start(made.rendezvous(number, "1:2", host=2)) for number in (1, 2))
    first.wait_for("step 8/")
    first.send(signal.SIGKILL)
    code, text = second.ends(120)
    assert code == 0 and "another process was lost" in text, text
    assert f"step {LONG_STEPS}/{LONG_STEPS}" in text and "step 1/" not in text
    check_whole(tmp_path / "run", LONG_STEPS)


@pytest.mark.slow
def test_a_machine_is_lost_for_good(
    config: Path, images: Path, tmp_path: Path, cluster: Callable[[list[str]], Cluster]
) -> None:
    """With --nnodes=2 the other waits as long as torchrun's join_timeout says, and ends."""
    made = cluster(command(config, images, tmp_path / "run", FOREVER))
    times = f"{TIMES},join_timeout=15"
    first, second = (made.start(made.rendezvous(number, "2", times=times)) for number in (1, 2))
    first.wait_for("step 8/")
    second.send(signal.SIGKILL)
    code, text = first.ends(60)
    assert code != 0 and "RendezvousTimeoutError" in text, text
    assert "error: rank 0 of 2: another process was lost" in text


@pytest.mark.slow
@pytest.mark.parametrize(("form", "lost"), [("rendezvous", 1), ("static", 2)])
def test_a_machine_is_replaced(
    form: str,
    lost: int,
    config: Path,
    images: Path,
    tmp_path: Path,
    undisturbed: Path,
    cluster: Callable[[list[str]], Cluster],
) -> None:
    """The same with --nnodes=2: the other waits for a new one, started by the same command. Both end where undisturbed
    ones end."""
    made = cluster(command(config, images, tmp_path / "run"))
    options = {
        number: made.static(number, "2") if form == "static" else made.rendezvous(number, "2", host=3 - lost)
        for number in (1, 2)
    }
    agents = {number: made.start(words, extra=OWN_STORE) for number, words in options.items()}
    agents[1].wait_for("step 8/")
    agents[lost].send(signal.SIGKILL)
    agents[lost] = made.start(options[lost], extra=OWN_STORE)
    for agent in agents.values():
        code, text = agent.ends(120)
        assert code == 0, text
    check_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["rendezvous", "static"])
def test_the_machine_that_hosts_the_rendezvous_is_lost(
    form: str, config: Path, images: Path, tmp_path: Path, cluster: Callable[[list[str]], Cluster]
) -> None:
    """The other ends, whatever --nnodes says, and does not wait; one process goes on later."""
    words = command(config, images, tmp_path / "run", LONG)
    made = cluster(words)
    machines = "2" if form == "static" else "1:2"
    first, second = (made.start(getattr(made, form)(number, machines)) for number in (1, 2))
    first.wait_for("step 8/")
    first.send(signal.SIGKILL)
    code, text = second.ends(60)
    assert code != 0 and "torch.distributed.DistNetworkError" in text, text
    assert "error: rank 1 of 2: another process was lost" in text
    done = call(*words[len(SYNCO_FAST) :])
    assert done.code == 0, done.err
    check_whole(tmp_path / "run", LONG_STEPS)


@pytest.mark.slow
def test_a_machine_hangs_and_wakes(
    config: Path, images: Path, tmp_path: Path, cluster: Callable[[list[str]], Cluster]
) -> None:
    """SIGSTOP to a torchrun and its process, which has rank 0 and the processes' store: the other says so and goes on
    alone. SIGCONT: both stop at a step and go on from there together. Then a stop for SIGUSR1 is one for all."""
    made = cluster(command(config, images, tmp_path / "run", FOREVER, "trainer.stall_minutes=0.15"))
    first, second = (made.start(made.rendezvous(number, "1:2", host=2), extra=OWN_STORE) for number in (1, 2))
    first.wait_for("step 8/")
    first.send(signal.SIGSTOP)
    second.wait_for("error: rank 1 of 2 has been at step ")
    second.wait_for("the other ranks cannot be asked")
    second.wait_for(" images/s ", len(second.said))
    first.send(signal.SIGCONT)
    second.wait_for("go on with --resume auto")
    (step,) = (int(line.split()[3][:-1]) for line in second.said if line.startswith("stopped after step "))
    first.wait_for(f"step {step + 1}/")
    os.kill(second.worker(), signal.SIGUSR1)
    for agent in (first, second):
        code, text = agent.ends(60)
        assert code != 0, text
    assert '"stopped"' in (tmp_path / "run" / "status.json").read_text()
    check_whole(tmp_path / "run", final_state(tmp_path / "run")["step"])


@pytest.mark.slow
def test_a_machine_is_taken(
    config: Path, images: Path, tmp_path: Path, cluster: Callable[[list[str]], Cluster]
) -> None:
    """SIGTERM to one torchrun: all processes stop at the same step, with a checkpoint of it, and no torchrun waits."""
    made = cluster(command(config, images, tmp_path / "run", FOREVER))
    first, second = (made.start(made.rendezvous(number, "2")) for number in (1, 2))
    first.wait_for("step 8/")
    second.process.send_signal(signal.SIGTERM)
    said = ""
    for agent in (first, second):
        code, text = agent.ends(60)
        assert code != 0, text
        said += text
    step = final_state(tmp_path / "run")["step"]
    assert said.count(f"stopped after step {step}; go on with --resume auto") == 2, said
    assert '"stopped"' in (tmp_path / "run" / "status.json").read_text()
    check_whole(tmp_path / "run", step)


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


@contextlib.contextmanager
def wired() -> Iterator[list[str]]:
    """Two network namespaces with a wire between them: 10.9.0.1 on device m1, and 10.9.0.2 on m2.

    Connections that get no answer are given up after seconds there, not after a quarter of an hour. The test is skipped
    where such namespaces cannot be made.
    """
    spaces = [f"machine-{os.getpid()}-{number}" for number in (1, 2)]
    try:
        try:
            for space in spaces:
                ip(f"netns add {space}")
            ip(f"link add m1 netns {spaces[0]} type veth peer name m2 netns {spaces[1]}")
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("network namespaces cannot be made here")
        for number, space in enumerate(spaces, 1):
            for words in ("link set lo up", f"addr add 10.9.0.{number}/24 dev m{number}", f"link set m{number} up"):
                ip(f"-n {space} {words}")
            ip(f"netns exec {space} sysctl -qw net.ipv4.tcp_retries2=4")
        yield spaces
    finally:
        for space in spaces:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                ip(f"netns del {space}")


@pytest.mark.slow
def test_the_network_is_cut(
    config: Path, images: Path, tmp_path: Path, cluster: Callable[[list[str]], Cluster]
) -> None:
    """No process dies and no connection is closed, there are just no answers any more: the machine that hosts the
    rendezvous goes on alone, and the other, which had rank 0, ends by itself."""
    with wired() as spaces, contextlib.ExitStack() as stack:
        made = cluster(command(config, images, tmp_path / "run", LONG))
        stack.callback(made.close)
        agents = []
        for number, space in enumerate(spaces, 1):
            options = made.rendezvous(number, "1:2", host=2)
            options += ["--rdzv-endpoint=10.9.0.2:29400", f"--local-addr=10.9.0.{number}"]
            inside = ["nsenter", f"--net=/var/run/netns/{space}"]
            agents.append(made.start(options, extra={"GLOO_SOCKET_IFNAME": f"m{number}"}, inside=inside))
        first, second = agents
        first.wait_for("step 8/")
        ip(f"-n {spaces[0]} link set m1 down")
        code, text = first.ends(120)
        assert code != 0 and "RendezvousConnectionError" in text and "error: rank 0 of 2" in text, text
        code, text = second.ends(120)
        assert code == 0 and f"step {LONG_STEPS}/{LONG_STEPS}" in text, text
    check_whole(tmp_path / "run", LONG_STEPS)
