"""Nothing reaches for the network: not an import, and not a run, which needs not even a loopback device."""

import ctypes
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from synco_fast.files import read_json_lines
from tests.conftest import REPOSITORY, TINY, environment
from tests.engine.runs import final_state, pretrain_command

NEWNET = 0x40000000
WATCHED = """
import sys
EVENTS = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind", "socket.gethostby", "socket.getaddrinfo")
def hook(event, arguments):
    if event.startswith(EVENTS):
        print("network:", event, *arguments[-1:], file=sys.stderr, flush=True)
sys.addaudithook(hook)
"""
"""Python's own doors to the network, told of on standard error."""

IMPORTS = """
import importlib, pkgutil
import synco_fast
names = [module.name for module in pkgutil.walk_packages(synco_fast.__path__, "synco_fast.")]
for name in names:
    if not name.rpartition(".")[2].startswith("_"):  # what is compiled is loaded by others
        importlib.import_module(name)
print(len(names))
"""
RUN = """
from synco_fast.cli import main
main()
"""
CONNECT = """
import socket, sys
socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=20)
"""


def cut_off() -> None:
    """This process has a network namespace of its own, whose only device, the loopback, is down. For root alone."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")


def python(code: str, *arguments: object, network: bool = True) -> subprocess.CompletedProcess[str]:
    """What Python says to some code, which is watched; the test is skipped where there can be no such namespace."""
    words = [sys.executable, "-c", WATCHED + code, *map(str, arguments)]
    try:
        return subprocess.run(
            words,
            cwd=REPOSITORY,
            env=environment(),
            preexec_fn=None if network else cut_off,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.SubprocessError:
        pytest.skip("network namespaces cannot be made here")


def test_that_network_would_be_noticed() -> None:
    """What is watched is told of, and there is none where there must be none: nobody answers who is there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = python(CONNECT, port)
        assert done.returncode == 0, done.stderr
        assert f"network: socket.connect ('127.0.0.1', {port})" in done.stderr
        done = python(CONNECT, port, network=False)
        assert done.returncode == 1 and "Network is unreachable" in done.stderr, done.stderr


def test_imports() -> None:
    done = python(IMPORTS)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50 and "network:" not in done.stderr, done.stderr


def test_a_run_without_any_network(images: Path, tmp_path: Path) -> None:
    """One process with kNN at each epoch's end, as it is started on a laptop."""
    config, output = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(TINY)
    words = pretrain_command(config, images, output, "--set", "knn.every_epochs=1", "--set", "trainer.epochs=2")
    done = python(RUN, *words[words.index("pretrain") :], network=False)
    assert done.returncode == 0, done.stderr
    assert "step 12/12" in done.stderr and "network:" not in done.stderr, done.stderr
    assert final_state(output)["step"] == 12
    assert [row["kind"] for row in read_json_lines(output / "metrics.jsonl")].count("knn") == 2
