"""Two engines compute the same."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from pcsim.errors import PCError
from pcsim.random_state import random_state_kept
from pcsim.verify.case import Case, EngineChoice
from pcsim.verify.comparing import compare, largest
from pcsim.verify.recording import RecordingOptimizer
from pcsim.verify.shrinking import report

LEARNING_RATE = 0.01
"""Of the plain gradient descent by which the weights move in a comparison."""


@random_state_kept()
def check_engines_agree(
    case: Case, engines: Sequence[EngineChoice] = ("reference", "batched"), tolerance: float = 1e-9
) -> None:
    """Engines agree on latents, energies, predictions, gradients, None or not, buffers, and on what they refuse.

    Each engine relaxes and learns on a copy of the network, twice in a row, so that what an engine keeps between
    batches is used. All start from the same random state.

    Args:
        case: what is run, and whether it is recorded; in float64, or give a tolerance that fits.
        engines: names or classes; each is compared with the first.
        tolerance: relative to the largest number compared, and at least to 1.

    Raises:
        AssertionError: they differ; names the node, edge or parameter, and prints the smallest network found on which
            they do, as code that fails again.
    """
    given = {"engines": tuple(engines), "tolerance": tolerance}
    recorded = "" if case.record is None else f", record={case.record}"
    report(_check, case, check_engines_agree, given, f"pcsim.verify.Case(net, clamps, relaxation, rule{recorded})")


def _check(case: Case, engines: Sequence[EngineChoice], tolerance: float) -> None:
    oracle = _run(case, engines[0])
    for engine in engines[1:]:
        _compare(case, oracle, _run(case, engine), tolerance, f"{_named(engine)} against {_named(engines[0])}")


@attrs.frozen
class _Outcome:
    """What a run left, by what and where."""

    tensors: dict[str, Tensor | None]
    refusal: str


@random_state_kept()
def _run(case: Case, engine: EngineChoice) -> _Outcome:
    own = case.copy()
    tensors: dict[str, Tensor | None] = {}
    try:
        simulator = own.simulator(engine)
        optimizer = RecordingOptimizer(own.network, LEARNING_RATE)
        for run in (1, 2):
            trace = simulator.infer(own.clamps, record=run == 2 if own.record is None else own.record)
            tensors |= {f"run {run}: energies": trace.energies, f"run {run}: F_t": trace.free_energies}
            tensors[f"run {run}: steps"] = torch.tensor(trace.steps)
            for name, node in own.network.nodes.items():
                tensors[f"run {run}: value of node {name!r}"] = node.value.clone()
                tensors[f"run {run}: forward value of node {name!r}"] = node.forward_value.clone()
                if node.predicted:
                    tensors[f"run {run}: forward prediction of node {name!r}"] = node.forward_prediction.clone()
                    tensors[f"run {run}: prediction of node {name!r}"] = node.prediction.clone()
                    tensors[f"run {run}: energy of node {name!r}"] = node.energy.clone()
            for name, edge in own.network.edges.items():
                tensors[f"run {run}: message of edge {name!r}"] = edge.message.clone()
            if any(node in trace.nodes for node in own.clamps):
                before = len(optimizer.gradients)
                if own.rule.every_step:
                    simulator.update(own.clamps, optimizer)
                else:
                    simulator.learn(optimizer)
                    simulator.learn(optimizer)  # from the same state, but by other weights
                for update, gradients in enumerate(optimizer.gradients[before:]):
                    where = f"run {run}, update {update}"
                    tensors |= {f"{where}: gradient of {name!r}": grad for name, grad in gradients.items()}
                tensors |= {f"run {run}: buffer {name!r}": b.clone() for name, b in own.network.named_buffers()}
        tensors |= {f"parameter {name!r}": p.detach() for name, p in own.network.named_parameters()}
    except PCError as refused:
        return _Outcome(tensors, type(refused).__name__)
    return _Outcome(tensors, "")


def _compare(case: Case, oracle: _Outcome, other: _Outcome, tolerance: float, who: str) -> None:
    for what, expected in oracle.tensors.items():
        got = other.tensors.get(what)
        if what not in other.tensors or (got is None) != (expected is None):
            shown = {True: "None", False: "a tensor"}
            said = "missing" if what not in other.tensors else shown[got is None]
            raise AssertionError(f"{who}: {what} is {said}, expected {shown[expected is None]}\n{case!r}")
        if got is not None and expected is not None:
            compare(f"{who}: {what}", got, expected, tolerance, largest(expected), case)
    if oracle.refusal != other.refusal:
        raise AssertionError(
            f"{who}: ended with {other.refusal or 'no error'}, expected {oracle.refusal or 'no error'}\n{case!r}"
        )


def _named(engine: EngineChoice) -> str:
    return engine if isinstance(engine, str) else repr(engine)
