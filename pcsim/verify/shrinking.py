"""From a case on which a check fails to a smaller one on which it fails too, and the report of both."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature

import attrs
import torch
from hypothesis import Phase, currently_in_test_context, settings

from pcsim.graph.energy import CrossEntropy
from pcsim.graph.network import Network
from pcsim.graph.rewrite import add_copy
from pcsim.verify.case import Case, NamedClamps, SeededNetwork, given_value
from pcsim.verify.source import call_code
from pcsim.verify.writing import drawn

MOST_TRIES = 300
"""Smaller cases that are tried at most."""

Check = Callable[[Case], None]
"""What raises AssertionError on a case."""


def report(
    check: Callable[..., None],
    case: Case,
    public: Callable[..., None],
    arguments: Mapping[str, object],
    names: str = "net, clamps, relaxation, rule",
    **further: object,
) -> None:
    """Run a check; where it fails, fail with the smallest case on which it does, and with code that fails again.

    Within a hypothesis test that shrinks, the search for the smallest is left to hypothesis.

    Args:
        check: called on a case and the arguments, raises AssertionError whose message ends in the case as code.
        case: what is checked.
        public: the check as users call it.
        arguments: of both, by name; those that are the public one's defaults are left out of the code.
        names: of that code, on which the public one is called.
        further: arguments of ``check`` alone.

    Raises:
        AssertionError: the check fails.
    """
    on, known = partial(check, **arguments, **further), signature(public).parameters
    given = {name: argument for name, argument in arguments.items() if argument != known[name].default}
    try:
        on(case)
    except AssertionError as failure:
        again, message = call_code(f"pcsim.verify.{public.__name__}({names}", given), str(failure)
        if not hypothesis_shrinks():
            small = smallest(case, on)
            if small is not case:
                left, sizes = _sizes(small), _sizes(case)
                parts = ", ".join(f"{left[part]} of {size} {part}" for part, size in sizes.items())
                message = f"{message.splitlines()[0]}\nThe smallest found that fails, {parts}:\n{_failure(on, small)}"
        raise AssertionError(f"{message}\n{again}") from None


def hypothesis_shrinks() -> bool:
    """Whether this runs within a hypothesis test whose settings let hypothesis look for smaller examples."""
    return currently_in_test_context() and Phase.shrink in settings().phases


def smallest(case: Case, check: Check) -> Case:
    """A case on which a check fails as it does on the given one, with as little as could be found in it.

    Greedily leaves out samples, inference steps, nodes, edges and clamps, and draws weights and clamps anew from a
    seed, as long as the check still fails.

    Args:
        case: on which the check fails; it stays as it is.
        check: raises AssertionError on it; a smaller case on which it raises anything else is not taken.

    Returns:
        The given case itself if nothing can be left out.
    """
    tries, current, shrunk = 0, case, True
    while shrunk:
        shrunk = False
        for candidate in _smaller(current):
            if tries == MOST_TRIES:
                return current
            tries += 1
            if _failure(check, candidate):
                current, shrunk = candidate, True
                break
    return current


def _failure(check: Check, case: Case) -> str:
    """The message with which a check fails on a case; empty where it does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(case.copy())
    except AssertionError as failure:
        return str(failure)
    except Exception:  # a part of a network need not make sense: then it is none that fails
        return ""
    return ""


def _sizes(case: Case) -> dict[str, int]:
    network = case.network
    sizes = len(network.nodes), len(network.edges), case.batch, case.relaxation.steps
    return dict(zip(("nodes", "edges", "samples", "steps"), sizes, strict=True))


def _smaller(case: Case) -> Iterator[Case]:
    """Cases with less in them, those with much less first."""
    if case.batch > 1:
        for size in dict.fromkeys((1, case.batch // 2)):
            for samples in (slice(0, size), slice(case.batch - size, None)):
                yield attrs.evolve(case, clamps=_samples(case.clamps, samples))
    for steps in sorted({0, 1, case.relaxation.steps // 2, case.relaxation.steps - 1}):
        if 0 <= steps < case.relaxation.steps:
            yield attrs.evolve(case, relaxation=attrs.evolve(case.relaxation, steps=steps))
    for gone in _chunks(list(case.network.nodes)):
        clamps = {name: given for name, given in case.clamps.items() if name not in gone}
        if clamps and len(gone) < len(case.network.nodes):
            yield attrs.evolve(case, network=without(case.network, nodes=gone), clamps=clamps)
    for gone in _chunks(list(case.network.edges)):
        yield attrs.evolve(case, network=without(case.network, edges=gone))
    if len(case.clamps) > 1:
        for name in case.clamps:
            yield attrs.evolve(case, clamps={other: given for other, given in case.clamps.items() if other != name})
    yield from _simpler(case)


def _simpler(case: Case) -> Iterator[Case]:
    """The same graph with weights and clamps that a few lines of code rebuild."""
    if not isinstance(case.network, SeededNetwork) or case.network.weight_seed is None:
        seeded = without(copy.deepcopy(case.network))
        seeded.seed_weights(0)
        yield attrs.evolve(case, network=seeded)
    clamps: NamedClamps = {}
    for name, given in case.clamps.items():
        if not given_value(given).is_floating_point():
            clamps[name] = given
            continue
        value = drawn(tuple(given_value(given).shape), given_value(given).dtype)
        if isinstance(case.network[name].energy_function, CrossEntropy):
            return  # which takes distributions
        clamps[name] = (value, given[1]) if isinstance(given, tuple) else value
    if any(not torch.equal(given_value(clamps[name]), given_value(given)) for name, given in case.clamps.items()):
        yield attrs.evolve(case, clamps=clamps)


def _chunks(names: Sequence[str]) -> Iterator[set[str]]:
    """Halves, quarters and so on, down to single names."""
    size = len(names) // 2
    while size:
        for start in range(0, len(names), size):
            yield set(names[start : start + size])
        size //= 2


def _samples(clamps: NamedClamps, samples: slice) -> NamedClamps:
    few: NamedClamps = {}
    for name, given in clamps.items():
        if isinstance(given, tuple):
            per_sample = given[1].shape == given[0].shape
            few[name] = given[0][samples], given[1][samples] if per_sample else given[1]
        else:
            few[name] = given[samples]
    return few


def without(network: Network, *, nodes: set[str] | None = None, edges: set[str] | None = None) -> SeededNetwork:
    """The rest of a network, its modules and parameters shared; of a seeded one, a copy that is seeded anew.

    Args:
        network: stays as it is.
        nodes: names of those left out, with their edges.
        edges: names of those left out.
    """
    seed = network.weight_seed if isinstance(network, SeededNetwork) else None
    source = network if seed is None else copy.deepcopy(network)
    rest = SeededNetwork()
    for node in source.nodes.values():
        if node.name not in (nodes or ()):
            add_copy(rest, node)
    for edge in source.edges.values():
        if edge.name not in (edges or ()) and edge.source_name in rest and edge.target_name in rest:
            rest.add_edge(edge.source_name, edge.target_name, edge.module, gain=edge.gain, name=edge.name)
    if source.places:
        rest.place({name: device for name, device in source.places.items() if name in rest})
    if seed is not None:
        rest.seed_weights(seed)
    return rest
