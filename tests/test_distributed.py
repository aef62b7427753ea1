"""Training by several processes: as one with the whole batch, and together to the end, whatever that is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
import training_processes as processes
from torch import Tensor

import pcsim
from pcsim.errors import ProcessError, SettingError

TESTS = Path(__file__).parent


Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[Found]]]:
    """Where three processes, and two of them, were at work, and what they have found: by their number, by rank."""
    folder = tmp_path_factory.mktemp("processes")
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["pcsim"])  # which takes most of the time
    working = multiprocessing.start_processes(
        processes.work, (3, str(folder)), nprocs=3, join=False, start_method="forkserver"
    )
    assert working is not None
    while not working.join(timeout=5):
        pass
    found = {
        number: [torch.load(folder / f"{number}-{rank}.pt", weights_only=False) for rank in range(number)]
        for number in (2, 3)
    }
    return folder, found


def flat(found: dict[str, Any]) -> dict[str, float | Tensor]:
    """All numbers by name."""
    numbers: dict[str, float | Tensor] = {}
    for name, part in found.items():
        numbers.update({f"{name}, {k}": v for k, v in part.items()} if isinstance(part, dict) else {name: part})
    return numbers


def close(found: dict[str, Any], expected: dict[str, Any], what: object) -> None:
    ours, theirs = flat(found), flat(expected)
    assert ours.keys() == theirs.keys()
    for name, number in ours.items():
        apart = (torch.as_tensor(number) - torch.as_tensor(theirs[name])).abs().max()
        # A metric is a mean of means of shares, of which accuracies are of float32.
        assert float(apart) < (1e-6 if "accuracy" in name else 1e-10), (what, name, float(apart))


def same(found: dict[str, Any], expected: dict[str, Any], what: object) -> None:
    ours, theirs = flat(found), flat(expected)
    assert ours.keys() == theirs.keys()
    for name, number in ours.items():
        assert torch.equal(torch.as_tensor(number), torch.as_tensor(theirs[name])), (what, name)


@pytest.mark.xdist_group("processes")
def test_several_processes_do_what_one_does_with_the_whole_batch(launched: tuple[Path, dict[int, list[Found]]]) -> None:
    folder, found = launched
    for name, scenario in processes.EQUAL.items():
        alone = scenario(None, folder)
        for number, by_rank in found.items():
            close(by_rank[0][name], alone, (name, number))
            for other in by_rank[1:]:
                same(other[name], by_rank[0][name], (name, number))
    straight = processes.trainer(None, callbacks=[pcsim.EarlyStopping(restore=False)])
    straight.fit(processes.loader(), epochs=6, validation=processes.loader())
    last = processes.resumed(None, folder)  # three processes, two, and one
    close(last, processes.result(straight), "gone on with another number of processes")


@pytest.mark.xdist_group("processes")
def test_all_end_together_and_know_why(launched: tuple[Path, dict[int, list[Found]]]) -> None:
    by_rank = launched[1][3]
    who = "rank 1 of 3 processes: "
    for scenario in processes.TOLD:
        for other in by_rank[1:]:
            for part in ("weights", "moments", "after", "evaluated"):
                ours, theirs = ({**own[scenario].get(part, {})} for own in (other, by_rank[0]))
                for name in [name for name in ours if "divergence" in scenario and "running" in name]:
                    del ours[name], theirs[name]  # each process's own until the end of an epoch
                same(ours, theirs, scenario)
    for rank, own in enumerate(by_rank):
        raised = {scenario: (found.get("kind"), found.get("message", "")) for scenario, found in own.items()}
        own_words = ("ValueError", "of my own"), ("ProcessError", f"{who}ValueError: of my own")
        assert raised["an exception"] == own_words[rank != 1]
        assert own["an exception"]["epochs"] == 1
        assert raised["a stop"] == ("", "")
        assert own["a stop"]["epochs"] == 2
        for scenario in ("a divergence", "a divergence, incremental"):
            kind, message = raised[scenario]
            assert kind == "DivergenceError"
            assert message.startswith(f"{who}epoch 1, batch 1: ")
            assert message.endswith("it changed no weights")
            same(own[scenario]["before"], own[scenario]["weights"], scenario)
        assert raised["uneven numbers"][0] == "SettingError"
        assert "further batch, and others have" in raised["uneven numbers"][1]
        assert raised["bad batch"][0] == "ClampError"
        assert raised["bad batch"][1].startswith(f"{who}clamp 'input': shape")
        assert "leave out the tolerance" in raised["by itself"][1]
        assert "a DistributedSampler for rank" in raised["own sampler"][1]
        assert len(own["kept equal"]["written"]) == (2 if rank == 0 else 0)
    draws = [own["kept equal"]["draws"] for own in by_rank]
    assert not torch.equal(draws[0], draws[1])
    halves = [own["own sampler"]["seen"].view(2, -1)[:, :-1] for own in by_rank]
    epochs = torch.cat(halves, 1)
    for epoch in epochs:
        assert set(epoch.tolist()) == set(processes.data().tensors[0][:, 0].tolist())
    assert not torch.equal(epochs[0], epochs[1]), "the sampler is told of the epoch"


def test_a_killed_process_ends_all_and_another_number_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(TESTS / "training_processes.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode != 0
    report = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in report, done.stderr
    assert "SIGKILL" in report, done.stderr
    straight = processes.trainer(None, callbacks=[pcsim.EarlyStopping(restore=False)])
    straight.fit(processes.loader(), epochs=4, validation=processes.loader())
    early = pcsim.EarlyStopping(restore=False)
    own = processes.trainer(None, callbacks=[processes.Killed(), early, pcsim.Checkpoint(tmp_path / "run")])
    own.load_checkpoint(tmp_path / "run")
    assert len(own.history.records) == 2
    own.fit(processes.loader(), epochs=2, validation=processes.loader())
    close(processes.result(own), processes.result(straight), "killed")


def test_a_single_process_needs_nobody() -> None:
    alone = pcsim.distributed.Processes()
    assert alone.alone
    assert alone.first
    assert alone.agree(stop=True, more=False) == (True, False)
    assert alone.from_first(lambda: 3) == 3
    assert alone.gather(5) == [5]
    with pytest.raises(SettingError, match="mine"), alone.together():
        raise SettingError("mine")
    assert issubclass(ProcessError, pcsim.PCError)
