"""Peers as contenders: each in a process that takes a step on command, one per round like everybody else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.contender import PEERS, Contender

ROOT = Path(__file__).resolve().parent.parent


class PeerError(RuntimeError):
    """A peer cannot run here."""


class Peer(Contender):
    """One peer on one chain, constant precision.

    Args:
        name: of the peer.
        variant: what it trains.
        workload: name of the chain.
        python: interpreter that has the peer.
        threads: cores it is kept to.
        small: run the workload's stand-in.

    Raises:
        PeerError: it does not start.
    """

    def __init__(self, name: str, variant: str, workload: str, python: str, threads: int, small: bool) -> None:
        super().__init__(variant, name)
        command = [python, "-W", "ignore", "-m", "benchmarks.peer_process", "--module", PEERS[name]]
        command += ["--workload", workload, "--threads", str(threads), *(["--small"] if small else [])]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            self._answer()
        except PeerError:
            self.close()
            raise

    def step(self) -> float:
        """Take one training step; the seconds it took, as the peer's own process measured them."""
        return float(self._ask("step")["seconds"])

    def half_squared_error(self) -> float:
        """Of a forward pass."""
        return float(self._ask("error")["half_squared_error"])

    def peak(self) -> float | None:
        """Most bytes that its process holds during a step, less those it held before the model was built."""
        found = self._ask("memory")["bytes"]
        return None if found is None else float(found)

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait()

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            print(command, file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise PeerError(f"{self.implementation}: its process has ended") from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"failure": "its process has ended"}
        if "failure" in answer:
            raise PeerError(f"{self.implementation}: {answer['failure']}")
        return answer


def start_peer(name: str, variant: str, workload: str, python: str | None, threads: int, small: bool) -> Peer | None:
    """A peer, or None, said on standard error, where it cannot run."""
    try:
        return Peer(name, variant, workload, python or sys.executable, threads, small)
    except PeerError as error:
        print(f"{workload}: left out {error}", file=sys.stderr)
        return None
