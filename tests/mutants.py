"""Does the suite catch defects? Plants them one at a time in a copy of the project, and runs the tests there.

    python tests/mutants.py                     all of them, the nearest test files first, then the rest
    python tests/mutants.py --nearest           the nearest files alone, which tell most in a tenth of the time
    python tests/mutants.py --file engine 3 17  those of some files, and some by number
    python tests/mutants.py --list              what there is

A defect is a small change that somebody might make by mistake: a file of ``pcsim``, a text that is found there exactly
once, what is put in its place, and what goes wrong then. It is *caught* where a test fails (or never ends), and
*survives* where none does. Some change nothing that can be seen, and say why: those are *equivalent*, and not run. One
whose text is not found any more is *stale*, and an error: write it anew for what the code has become. It needs a system
that can fork: what all runs import is imported once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import pytest
import torch._dynamo  # noqa: F401 - what the first optimizer imports, for seconds

PROJECT = Path(__file__).resolve().parent.parent
COPIED = ("pcsim", "tests", "docs", "examples", "benchmarks", "*.cfg", "*.toml", "*.md", "*.yml", "*.cff", "LICENSE")
LONGEST = 1800
"""Seconds after which tests count as ones that never end."""


class Mutant(NamedTuple):
    """One defect."""

    file: str
    """In the folder ``pcsim``."""
    old: str
    """Found there exactly once."""
    new: str
    reason: str
    """What goes wrong."""
    equivalent: str = ""
    """Why no test can see it; empty where one should."""


NEAREST = {
    "graph/energ": ("by_hand", "closed_forms", "engines"),
    "graph/node": ("by_hand", "graph", "contract", "errors", "closed_forms"),
    "graph/edge": ("by_hand", "contract", "engines"),
    "graph/part": ("graph", "engines", "contract"),
    "graph/combining": ("graph", "engines"),
    "graph/clamping": ("by_hand", "closed_forms", "graph", "properties"),
    "graph/levels": ("by_hand", "graph", "properties"),
    "graph/network": ("graph", "rewrite", "contract", "errors", "precision"),
    "graph/fingerprint": ("graph", "contract", "any_order", "engines"),
    "graph/statistics": ("engines", "contract"),
    "graph/probing": ("graph", "contract", "errors", "engines"),
    "graph/checks": ("errors", "graph", "contract"),
    "graph/rewrite": ("rewrite", "backprop_agreement"),
    "dynamics/nudging": ("nudging",),
    "dynamics": ("by_hand", "closed_forms", "errors", "rewrite", "backprop_agreement"),
    "engine/rates": ("error_coordinates",),
    "engine/landscape": ("closed_forms",),
    "engine/reading": ("by_hand", "contract", "properties"),
    "engine/kernels": ("kernels", "engines", "contract"),
    "engine/problem": (
        "by_hand",
        "closed_forms",
        "nudging",
        "error_coordinates",
        "engines",
        "streams",
        "recordings",
        "precision",
    ),
    "engine/local_rules": ("by_hand", "closed_forms", "engines", "error_coordinates", "streams"),
    "engine/batched/program": ("engines", "own_rules", "streams", "error_coordinates", "any_order", "closed_forms"),
    "engine/batched/stages": ("engines", "own_rules", "streams", "error_coordinates", "any_order", "closed_forms"),
    "engine/batched/operations": ("kernels", "engines"),
    "engine/batched/places": ("engines", "kernels", "compiled", "playback"),
    "engine/batched/compiled": ("compiled",),
    "engine/batched/playback": ("playback",),
    "engine": ("engines", "streams", "error_coordinates", "any_order", "closed_forms"),
    "simulator": ("errors", "by_hand", "nudging", "contract", "any_order", "engines", "closed_forms"),
    "clamps": ("errors", "graph", "closed_forms", "integers", "streams"),
    "targets": ("errors", "training"),
    "trace": ("diagnosis", "closed_forms"),
    "training": ("training", "checkpoints"),
    "callbacks": ("checkpoints", "training", "tensorboard"),
    "metrics": ("training",),
    "io": ("checkpoints", "saving"),
    "saving": ("saving", "arguments"),
    "arguments": ("arguments", "saving"),
    "conversion": ("conversion",),
    "data": ("data",),
    "diagnosis": ("diagnosis", "closed_forms"),
    "verify": ("verify", "backprop_agreement", "properties", "own_rules"),
    "topologies": ("topologies", "graph"),
}
"""Test files by the beginning of a file's name; the longest that fits counts."""

MUTANTS = (
    Mutant(
        "graph/energy.py",
        "return 0.5 * (value - prediction).square()",
        "return (value - prediction).square()",
        "The Gaussian energy loses its half.",
    ),
    Mutant(
        "graph/energy.py",
        "weighted.sum(self._axis, keepdim=True) - weighted",
        "weighted.sum(1, keepdim=True) - weighted",
        "The cross-entropy's gradient sums along the first axis, whichever holds the classes.",
    ),
    Mutant(
        "graph/energy.py",
        "return self.axis + 1 if self.axis >= 0 else self.axis",
        "return self.axis + 1",
        "A negative axis of the cross-entropy counts the batch.",
    ),
    Mutant(
        "graph/energy.py",
        "total = (scale * self.unit_energy(value.detach(), leaf)).sum()",
        "total = self.unit_energy(value.detach(), leaf).sum()",
        "An energy of a user's own forgets precision and weight in what it sends.",
    ),
    Mutant(
        "graph/energies.py",
        "return error.sign() / self.width",
        "return error.sign() * self.width",
        "The pull of the Laplace energy is multiplied by its width.",
    ),
    Mutant(
        "graph/energies.py",
        "return error.clamp(-self.threshold, self.threshold)",
        "return error.clamp(-1.0, 1.0)",
        "The Huber energy's slope ignores its threshold.",
    ),
    Mutant(
        "graph/energies.py",
        "return (self.freedom + 1) * error / (self.freedom + error.square())",
        "return (self.freedom + 1) * error / (1 + error.square())",
        "Student's energy has a slope of one degree of freedom.",
    ),
    Mutant(
        "graph/energies.py",
        "inverse = self.inverse.to(flat)",
        "inverse = self.covariance.to(flat)",
        "The correlated Gaussian takes the covariance for its inverse.",
    ),
    Mutant(
        "graph/node.py",
        "start = torch.full(sizes, math.log(precision.initial), device=self.device)",
        "start = torch.full(sizes, precision.initial, device=self.device)",
        "A learned precision starts at the exponential of what was asked for.",
    ),
    Mutant(
        "graph/node.py",
        '        self._buffers.pop("prior", None)\n',
        "",
        "A prior that is taken away stays as a buffer.",
    ),
    Mutant(
        "graph/node.py",
        "        self._energy_weight = float(weight)\n        self.network.revision += 1",
        "        self._energy_weight = float(weight)",
        "A new energy weight is not noticed by programs.",
    ),
    Mutant(
        "graph/node.py",
        "            self._number = float(precision)\n        self.log_precision = None",
        "            self._number = float(precision)\n        self.log_precision = self.log_precision",
        "A number does not take the place of a learned precision.",
    ),
    Mutant(
        "graph/node.py",
        "found = [parameter for edge in self.incoming for parameter in edge.parameters()] + list(self.parameters())",
        "found = [parameter for edge in self.incoming for parameter in edge.parameters()]",
        "A node's own parameters do not count among what its error teaches.",
    ),
    Mutant(
        "graph/edge.py",
        "        self._gain = float(gain)\n        self.network.revision += 1",
        "        self._gain = float(gain)",
        "A new gain is not noticed by programs.",
    ),
    Mutant(
        "graph/edge.py",
        "return contribution if self._gain == 1.0 else self._gain * contribution",
        "return contribution if self._gain > 0 else self._gain * contribution",
        "Gains above zero are left out.",
    ),
    Mutant(
        "graph/part.py",
        "if self.stochastic and seed is not None:",
        "if self.stochastic and seed:",
        "A seed of zero draws anew at every evaluation.",
    ),
    Mutant(
        "graph/part.py",
        'f"{self.kind} {self._name}"',
        'f"{self.kind}"',
        "All edges of a network draw the same mask.",
    ),
    Mutant(
        "graph/part.py",
        "if hold and self.moves else",
        "if self.moves else",
        "Buffers that move do not even move once per batch.",
    ),
    Mutant(
        "graph/combining.py",
        "return torch.cat(contributions, self.axis + 1 if self.axis >= 0 else self.axis)",
        "return torch.cat(contributions, 1)",
        "A concatenation along another axis than the first.",
    ),
    Mutant(
        "graph/clamping.py",
        "inferred_roots = [n for n in self.free if not self.network.nodes[n].predicted]",
        "inferred_roots = [n for n in self.free if not self.network.nodes[n].incoming]",
        "A root with a prior makes prediction relax.",
    ),
    Mutant(
        "graph/clamping.py",
        "kept = (edge for edge in self.network.edges.values() if edge.target_name not in self.full)",
        "kept = iter(self.network.edges.values())",
        "A clamp no longer cuts a cycle.",
    ),
    Mutant(
        "graph/levels.py",
        "            if not awaited[reader]:\n                heappush",
        "            if True:\n                heappush",
        "A component comes before one that it reads.",
    ),
    Mutant(
        "graph/levels.py",
        "component = np.argsort(np.argsort(first))[labels]",
        "component = labels",
        "Components come in the order that the search has found them in.",
    ),
    Mutant(
        "graph/clamping.py",
        "return frozenset(on_cycle | (loops - self.full))",
        "return frozenset(on_cycle)",
        "A self-loop is taken for a feed-forward graph.",
    ),
    Mutant(
        "graph/clamping.py",
        "found = (self.network.nodes[name] for name in self.free if name not in self.partial)",
        "found = (self.network.nodes[name] for name in self.free)",
        "Partially clamped nodes keep apart what they receive.",
    ),
    Mutant(
        "graph/clamping.py",
        "return drifts and name not in self.partial and not node.outgoing",
        "return drifts and name not in self.partial",
        "In prediction a cross-entropy node that is read by others follows its logits.",
    ),
    Mutant(
        "graph/clamping.py",
        "clamped = self.full | self.partial\n        return tuple(name for name in self.network.nodes if name in clamped",
        "clamped = self.full\n        return tuple(name for name in self.network.nodes if name in clamped",
        "A partially clamped node is no target.",
    ),
    Mutant(
        "graph/levels.py",
        "length = hops[name] + hop[name]",
        "length = hops[name] + 1",
        "Deterministic nodes count as hops within a cycle.",
    ),
    Mutant(
        "graph/levels.py",
        "name: max(level[after] + hop[after] for after in outside)",
        "name: min(level[after] + hop[after] for after in outside)",
        "A level is that of the shortest path.",
    ),
    Mutant(
        "graph/levels.py",
        "edges = [(e.source_name, e.target_name) for e in network.edges.values() if e.source_name not in ends]",
        "edges = [(e.source_name, e.target_name) for e in network.edges.values()]",
        "Levels go through a target.",
    ),
    Mutant(
        "graph/network.py",
        "KEPT_FINGERPRINTS = 4",
        "KEPT_FINGERPRINTS = 1",
        "Training and evaluation make programs anew in turn.",
    ),
    Mutant(
        "graph/network.py",
        "shortest, longest = min(low for low, _ in reached) + hop",
        "shortest, longest = min(low for low, _ in reached) + 1",
        "A deterministic node counts as a hop in the shortest of two paths.",
    ),
    Mutant(
        "graph/network.py",
        '        return {**self.__dict__, "reader": None, "_fingerprints": []}',
        '        return {**self.__dict__, "_fingerprints": []}',
        "A copy shows the state of the original.",
    ),
    Mutant(
        "graph/fingerprint.py",
        "[*map(_requires_grad, self.parameters)],",
        "[],",
        "Freezing a parameter is not noticed.",
    ),
    Mutant(
        "graph/fingerprint.py",
        "[*compress(count(), self._hooks)],",
        "[],",
        "A hook that is set between runs is not noticed.",
    ),
    Mutant(
        "graph/fingerprint.py",
        "return same and not any(self._empty)",
        "return same",
        "A parameter that is put where there was none is not noticed.",
    ),
    Mutant(
        "graph/fingerprint.py",
        "[*map(_training, self._modules)],",
        "[],",
        "A change of mode is not noticed.",
    ),
    Mutant(
        "graph/statistics.py",
        "            if module.training:\n                stack",
        "            if module:\n                stack",
        "Modules in evaluation mode lose their running statistics.",
    ),
    Mutant(
        "graph/statistics.py",
        'RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")',
        'RUNNING_STATISTICS = ("running_mean", "running_var")',
        "The count of batches moves at every evaluation.",
    ),
    Mutant(
        "graph/probing.py",
        "before = [(part, part.training) for part in module.modules()]",
        "before = [(part, module.training) for part in module.modules()]",
        "A frozen normalisation comes back in training mode.",
    ),
    Mutant(
        "graph/probing.py",
        "return not plain(module) or any(isinstance(part, DRAWING) for part in module.modules())",
        "return any(isinstance(part, DRAWING) for part in module.modules())",
        "A user's own module is taken for one that never draws.",
    ),
    Mutant(
        "graph/checks.py",
        "if not isinstance(found, Tensor) or not (whole_sample or found.shape == value.shape):",
        "if not isinstance(found, Tensor):",
        "An energy that sums over units is let in.",
    ),
    Mutant(
        "graph/checks.py",
        "or any(size <= 0 for size in found):",
        "or any(size < 0 for size in found):",
        "A shape of no units is let in.",
    ),
    Mutant(
        "graph/rewrite.py",
        "weight = 1.0 / (rate * peak)",
        "weight = 1.0 / rate",
        "Auxiliary nodes forget the peak.",
    ),
    Mutant(
        "graph/rewrite.py",
        "own = 1.0 if place == 0 and not _is_identity(edge) else weight",
        "own = 1.0 if not _is_identity(edge) else weight",
        "Later nodes of a chain behind a module weigh 1.",
    ),
    Mutant(
        "graph/rewrite.py",
        "lacking[edge.name] = apart - (0 if passes_through else 1)",
        "lacking[edge.name] = apart - (0 if edge.target.deterministic else 1)",
        "A clamped deterministic node is taken for one that passes errors on.",
    ),
    Mutant(
        "graph/rewrite.py",
        "key: Hashable = (edge.source_name, edge.gain) if shared else name",
        "key: Hashable = (edge.source_name,) if shared else name",
        "Edges of different gain share a chain.",
    ),
    Mutant(
        "graph/rewrite.py",
        "        energy_weight=node.energy_weight,\n        precision=node.own_precision if",
        "        precision=node.own_precision if",
        "A copied node has weight 1.",
    ),
    Mutant(
        "graph/rewrite.py",
        "        copied.log_precision = node.log_precision",
        "        copied.log_precision = copied.log_precision",
        "A copied node learns a precision of its own.",
    ),
    Mutant(
        "dynamics/inference.py",
        "velocity = descent if velocity is None else descent + self.momentum * velocity",
        "velocity = descent if velocity is None else (1 - self.momentum) * descent + self.momentum * velocity",
        "Momentum is an average.",
    ),
    Mutant(
        "dynamics/inference.py",
        "return self.rate * (descent + self.momentum * velocity if self.nesterov else velocity), velocity",
        "return self.rate * (velocity + self.momentum * velocity if self.nesterov else velocity), velocity",
        "Nesterov's step takes the velocity for the descent.",
    ),
    Mutant(
        "dynamics/inference.py",
        "return usual and not (self.momentum or self.temperature)",
        "return usual and not self.momentum",
        "A temperature counts as a plain step.",
    ),
    Mutant(
        "dynamics/inference.py",
        "return math.sqrt(2 * self.rate * self.temperature) * drawn",
        "return math.sqrt(self.rate * self.temperature) * drawn",
        "Noise lacks its two.",
    ),
    Mutant(
        "dynamics/inference.py",
        'f"{node} {step}".encode()',
        'f"{step}".encode()',
        "All nodes draw the same noise.",
    ),
    Mutant(
        "dynamics/inference.py",
        "if not 0 <= self.momentum < 1:",
        "if not 0 <= self.momentum <= 1:",
        "A momentum of 1 is let in.",
    ),
    Mutant(
        "dynamics/inference.py",
        "spikes = peak > 0 and min(later) <= STABLE_PRECISION * peak",
        "spikes = peak > 0 and max(later) <= STABLE_PRECISION * peak",
        "What counts as a spike is judged by the largest later precision.",
    ),
    Mutant(
        "dynamics/precision.py",
        "return self.peak if step == level else self.alpha",
        "return self.peak if level is not None and step >= level else self.alpha",
        "The spike lasts.",
    ),
    Mutant(
        "dynamics/precision.py",
        "count = steps - level\n",
        "count = steps - level - 1\n",
        "The tail of the decaying schedule sums a term too few.",
    ),
    Mutant(
        "dynamics/precision.py",
        'share = total if self.tail == "multiplied" else 1.0 / total',
        "share = total",
        "Both tails are the multiplied one.",
    ),
    Mutant(
        "dynamics/precision.py",
        "return math.exp(-self.k * since) / 100.0 * share",
        "return math.exp(-since) / 100.0 * share",
        "The tail forgets k.",
    ),
    Mutant(
        "dynamics/precision.py",
        "for name, level in levels.items() if level >= steps]",
        "for name, level in levels.items() if level > steps]",
        "A schedule that is one step short is let through.",
    ),
    Mutant(
        "dynamics/precision.py",
        "return cls(alpha=1.0, peak=1.0 / rate)",
        "return cls(alpha=1.0, peak=rate)",
        "The covariance of the paper is taken for a precision.",
    ),
    Mutant(
        "dynamics/learning.py",
        "if any(schedule.at(step, level, steps) != 0 for level in {*levels.values()} for step in range(level)):",
        "if any(schedule.at(step, level, steps) != 0 for level in {*levels.values()} for step in range(1, level)):",
        "A schedule that speaks at the first step is let through.",
    ),
    Mutant(
        "dynamics/learning.py",
        "if level >= relaxation.steps]",
        "if level > relaxation.steps]",
        "The arrival rule runs one step too short.",
    ),
    Mutant(
        "dynamics/nudging.py",
        "return 0.5 if self.centred else 1.0 if self.beta > 0 else -1.0",
        "return 0.5 if self.centred else 1.0",
        "Negative nudging keeps the sign.",
    ),
    Mutant(
        "dynamics/nudging.py",
        "return (0.5 if self.centred else 1.0) / self.beta",
        "return (0.5 if self.centred else 1.0) / abs(self.beta)",
        "Soft nudging loses the sign of β.",
    ),
    Mutant(
        "dynamics/nudging.py",
        "return attrs.evolve(self, beta=-self.beta, centred=False)",
        "return attrs.evolve(self, centred=False)",
        "The other side of centred nudging is the same side.",
    ),
    Mutant(
        "engine/problem.py",
        "return self.record or self.relaxation.least_rate is not None",
        "return self.record",
        "Judged steps are judged by stale predictions.",
    ),
    Mutant(
        "engine/problem.py",
        "return own if self.target_weight == 1 or node not in self.clamping.targets else own * self.target_weight",
        "return own if self.target_weight == 1 or node not in self.clamping.targets else self.target_weight",
        "Soft nudging puts β in the place of a target's weight.",
    ),
    Mutant(
        "engine/problem.py",
        "return settled and step >= max([*self.arrivals.values(), *shown], default=0)",
        "return settled",
        "A relaxation stops before its error has arrived.",
    ),
    Mutant(
        "engine/problem.py",
        "return max(self.steps - 1, 0)",
        "return self.steps",
        "What is read is weighed by the precision of a step that was never taken.",
    ),
    Mutant(
        "engine/problem.py",
        "return weighed - 0.5 * task.weight(name) * node.log_precision.detach().expand(node.shape).sum()",
        "return weighed - 0.5 * task.weight(name) * node.log_precision.detach().sum()",
        "A learned precision's normaliser counts one unit.",
    ),
    Mutant(
        "engine/problem.py",
        "unit = factor * node.energy_function.unit_energy(value, prediction) - 0.5 * weight",
        "unit = factor * node.energy_function.unit_energy(value, prediction) - 0.5",
        "A learned precision's normaliser forgets the node's weight.",
    ),
    Mutant(
        "engine/problem.py",
        "return torch.where(self.mask, self.value, value)",
        "return self.value",
        "A mask clamps all units.",
    ),
    Mutant(
        "engine/local_rules.py",
        "value[name] = batch.clamped(name, state.value[name] + move)",
        "value[name] = state.value[name] + move",
        "In the reference a masked unit moves.",
    ),
    Mutant(
        "engine/local_rules.py",
        "return received if self._stays(name, before, prediction) else received + (before - prediction)",
        "return received",
        "An error forgets that its prediction has changed.",
    ),
    Mutant(
        "engine/local_rules.py",
        "now.state.multiplier = state.multiplier = {",
        "state.multiplier = {",
        "Multipliers grow a step late.",
    ),
    Mutant(
        "engine/local_rules.py",
        "        own = {parameter: gradient / -self.batch.size for",
        "        own = {parameter: gradient / -1 for",
        "Gradients are summed over the batch.",
    ),
    Mutant(
        "engine/local_rules.py",
        "if rates is not None and _take_back(rates.judge(now.free_energies()), before, state):",
        "if rates is not None and rates.judge(now.free_energies()) is not None:",
        "A step that raised the energy stays taken.",
    ),
    Mutant(
        "engine/reached.py",
        "or not nodes[name].energy_function.rests_at_prediction",
        "or False",
        "An energy that is not at rest teaches nothing at the start.",
    ),
    Mutant(
        "engine/reached.py",
        "live = self._at_start | self._moved if self._task.learns_forward else self._live",
        "live = self._live",
        "The forward rule learns where only predictions have moved.",
    ),
    Mutant(
        "engine/rates.py",
        "fell, rose = energy < before, ~(energy <= before)",
        "fell, rose = energy <= before, ~(energy <= before)",
        "A sample whose energy stays keeps its rate.",
    ),
    Mutant(
        "engine/rates.py",
        "self._energy = torch.where(rose, before, energy)",
        "self._energy = energy",
        "A step that was taken back is compared with what it would have been.",
    ),
    Mutant(
        "engine/rates.py",
        "(self.factor / 2).clamp(min=self._least)",
        "(self.factor / 2)",
        "A sample's rate falls below the least.",
    ),
    Mutant(
        "engine/landscape.py",
        "found[name] = self._values[name].masked_scatter(free, own)\n            taken += count",
        "found[name] = self._values[name].masked_scatter(free, own)",
        "All free nodes take the first units.",
    ),
    Mutant(
        "engine/landscape.py",
        "return ~clamp.mask.expand_as(value)",
        "return clamp.mask.expand_as(value)",
        "The given units of a mask are put to rest.",
    ),
    Mutant(
        "engine/reading.py",
        "now = Evaluation(state, state.last_step, later=True)",
        "now = Evaluation(state, state.steps, later=True)",
        "What is read is weighed by the step after the last.",
    ),
    Mutant(
        "engine/reading.py",
        "return torch.zeros_like(self.prediction(node))",
        "return self.prediction(node)",
        "A deterministic node shows its prediction as an error.",
    ),
    Mutant(
        "engine/planning/liveness.py",
        "live |= before.live & wiring.multiplied",
        "live |= before.live & wiring.multiplied & weighing",
        "A multiplier of a silent node sends nothing.",
    ),
    Mutant(
        "engine/planning/liveness.py",
        "read = active | teaching | wiring.probed | (before.live if task.watched else teaching)",
        "read = active | teaching | wiring.probed",
        "Recorded energies are a step stale.",
    ),
    Mutant(
        "engine/planning/liveness.py",
        "touched |= before.moved | (wiring.free & (task.relaxation.temperature > 0))",
        "touched |= wiring.free & (task.relaxation.temperature > 0)",
        "What has momentum is left where it is.",
    ),
    Mutant(
        "engine/planning/liveness.py",
        "        changed_nodes[wiring.transfer_user[learned[wiring.transfer_used]]] = True\n",
        "",
        "A transfer whose weights have learned is not evaluated again.",
    ),
    Mutant(
        "engine/planning/liveness.py",
        "        changed[wiring.edge_user[learned[wiring.edge_used]]] = True\n",
        "",
        "An edge whose weights have learned is not evaluated again.",
    ),
    Mutant(
        "engine/planning/liveness.py",
        "formed=before.formed & ~move,",
        "formed=before.formed,",
        "A value that was put together once stays as it was then.",
    ),
    Mutant(
        "engine/planning/liveness.py",
        "active = live & wiring.energetic & (wiring.energy_weight != 0)\n    upstream",
        "active = live & wiring.energetic\n    upstream",
        "Nodes of weight zero teach zeros.",
    ),
    Mutant(
        "engine/planning/liveness.py",
        "stale=before.stale | changed,",
        "stale=before.stale | move[wiring.source],",
        "Weights that have learned make no edge stale.",
    ),
    Mutant(
        "engine/planning/liveness.py",
        "stale = stale | (wiring.between & nodes[wiring.source])",
        "stale = stale",
        "What is behind a deterministic node that was evaluated again stays stale.",
    ),
    Mutant(
        "engine/planning/plan.py",
        "known = once & ~wiring.any_of(wiring.between & wiring.learns[wiring.source], wiring.target)",
        "known = once",
        "Errors that last are kept though they pass through deterministic nodes that learn.",
    ),
    Mutant(
        "engine/planning/plan.py",
        "moves = wiring.free[known] & (not rule.at_arrival)",
        "moves = wiring.free[known]",
        "The arrival rule learns from an attenuated error.",
    ),
    Mutant(
        "engine/planning/plan.py",
        "once &= sending.last == wiring.level if rule.at_arrival else sending.over & wiring.proportional",
        "once &= sending.last == wiring.level if rule.at_arrival else wiring.proportional",
        "An error that is changed by what arrives later is kept.",
    ),
    Mutant(
        "engine/planning/plan.py",
        "heard = self._sending.over & (self._sending.heard >= 0)",
        "heard = self._sending.heard >= 0",
        "What a node hears late is shrunk as if its own error had been sent after it.",
    ),
    Mutant(
        "engine/batched/errors.py",
        "left = 1 - memory.task.relaxation.rate * weights[",
        "left = 1 - weights[",
        "Nodes whose error is what they have received move by all of it.",
    ),
    Mutant(
        "engine/planning/plan.py",
        "plain = relaxation.plain and relaxation.tolerance is None and not task.closes",
        "plain = relaxation.tolerance is None and not task.closes",
        "With momentum an error is taken to last.",
    ),
    Mutant(
        "engine/planning/plan.py",
        "return self.wiring.displaced & ~self._after(None).predicted",
        "return self.wiring.displaced.copy()",
        "Nodes whose predictions change keep apart what they receive.",
    ),
    Mutant(
        "engine/planning/wiring.py",
        "self.proportional = self.gaussian & ~np.isnan(self.own_precision) & ~partial",
        "self.proportional = ~np.isnan(self.own_precision) & ~partial",
        "Any energy counts as Gaussian where an error lasts.",
    ),
    Mutant(
        "engine/planning/wiring.py",
        "self.live_at_start = self.energetic & (given | self._mask(clamping.placed, place) | restless)",
        "self.live_at_start = self.energetic & (given | self._mask(clamping.placed, place))",
        "An energy that is not at rest is left out at the start.",
    ),
    Mutant(
        "engine/planning/wiring.py",
        "        for generation, into in self.generations:\n            self.hears[generation] |=",
        "        for generation, into in ():\n            self.hears[generation] |=",
        "Deterministic nodes never hear.",
    ),
    Mutant(
        "engine/batched/engine.py",
        "if self._latest is None or self._latest[0] is not state or self._versions != _versions(state.task):",
        "if self._latest is None or self._latest[0] is not state:",
        "Learning twice takes the Jacobians of weights that are gone.",
    ),
    Mutant(
        "engine/batched/engine.py",
        "gradients[parameter] = gradient + gradients[parameter] if parameter in gradients else gradient.clone()",
        "gradients[parameter] = gradient.clone()",
        "A shared parameter loses what it has learned after the relaxation.",
    ),
    Mutant(
        "engine/batched/engine.py",
        "if shown is None or not program.holds(shown):",
        "if shown is None or program is self._programs[0]:",
        "A failed run writes into the state that is shown.",
    ),
    Mutant(
        "engine/batched/engine.py",
        "        self._latest = None\n        recorded, probed = [], list[Probed]()",
        "        recorded, probed = [], list[Probed]()",
        "After a failed run gradients come from its scratch.",
    ),
    Mutant(
        "engine/batched/engine.py",
        "key = (task, batch.size, batch.dtype, batch.device, *devices)",
        "key = (task, batch.dtype, batch.device, *devices)",
        "A batch of another size meets a program of the last one.",
    ),
    Mutant(
        "engine/batched/engine.py",
        "return None if state.altered else self._latest[1]",
        "return self._latest[1]",
        "What was frozen after the relaxation learns.",
    ),
    Mutant(
        "engine/batched/stages.py",
        'read_late = any(e.source in values and e.chain and e.chain[0].kernel.reads == "input" for e in memory.edges)',
        "read_late = False",
        "Values move while messages still have to read them.",
    ),
    Mutant(
        "engine/batched/stages.py",
        "self._writes_first = self._direct and not (self._task.record or self._task.probes)",
        "self._writes_first = self._direct and not self._task.probes",
        "What a recorded run reads was never written.",
    ),
    Mutant(
        "engine/problem.py",
        '"noise is drawn (temperature)": relaxation.temperature > 0,',
        '"noise is drawn (temperature)": False,',
        "All steps draw the same noise.",
    ),
    Mutant(
        "engine/batched/stages.py",
        "fading = self._fading(phase) & ~(heard | learning)",
        "fading = self._fading(phase) & ~heard",
        "What learns from the errors that it has sent finds none.",
    ),
    Mutant(
        "engine/batched/stages.py",
        "fading = self._fading(phase) & ~(heard | learning)",
        "fading = self._fading(phase) & ~learning",
        "Nodes that fade send what they sent before.",
    ),
    Mutant(
        "engine/batched/program.py",
        "        self.learning(steps)  # compiled before it is captured\n        self._found.clear()\n",
        "        self.learning(steps)  # compiled before it is captured\n",
        "Gradients that were interrupted are counted by the next call.",
    ),
    Mutant(
        "engine/batched/engine.py",
        "if program is None or program.forward_pass_lost:",
        "if program is None:",
        "Running statistics of the forward pass are those of what was evaluated last.",
    ),
    Mutant(
        "engine/planning/plan.py",
        "closing()[1] if self.task.closes or counts else",
        "closing()[1] if self.task.closes else",
        "Running statistics put the last prediction in the place of the first.",
    ),
    Mutant(
        "engine/planning/liveness.py",
        "            changed |= wiring.own_edge\n",
        "            pass\n",
        "A module that reads another's weight is not evaluated anew once that learns.",
    ),
    Mutant(
        "graph/fingerprint.py",
        "identity += id(part), len(part._buffers), *part._forward_hooks, *part._forward_pre_hooks",
        "identity.append(id(part))",
        "What is put on a module after its edge was added is not looked at.",
    ),
    Mutant(
        "engine/batched/stages.py",
        "factors[teaching] = 1 / sent[teaching]",
        "factors[teaching] = 1.0",
        "What an arriving error teaches keeps its precision.",
    ),
    Mutant(
        "engine/batched/program.py",
        "        self._bring_weights()\n        for node in self._memory.nodes:\n            node.load",
        "        for node in self._memory.nodes:\n            node.load",
        "Stacked weights are those of the first run.",
    ),
    Mutant(
        "engine/batched/program.py",
        "        if len(self._stacks) > known:\n            self._bring_weights()",
        "        if len(self._stacks) > known:\n            pass",
        "A stack that learning alone reads is empty at first.",
    ),
    Mutant(
        "engine/batched/program.py",
        "if self._task.relaxation.multipliers and steps:",
        "if self._task.relaxation.multipliers:",
        "Multipliers grow without a step.",
    ),
    Mutant(
        "engine/batched/stages.py",
        'return "forward" if self._task.reads_forward else "present"',
        'return "forward" if self._task.learns_forward else "present"',
        "The arrival rule's running statistics are of the relaxed state.",
    ),
    Mutant(
        "engine/batched/weights.py",
        "            if parameter in learned or parameter._version != version",
        "            if parameter in learned",
        "A weight that decays without a gradient stays in its stack.",
        "Optimizers of torch leave alone what has no gradient, and nothing else moves weights within a run.",
    ),
    Mutant(
        "engine/batched/weights.py",
        "self._copy(changed[0], changed[-1] + 1)",
        "self._copy(changed[0], changed[-1])",
        "The last of the weights that have learned is not brought.",
    ),
    Mutant(
        "engine/kernels/chain.py",
        'needed_before = place > 0 and chain[place - 1].kernel.reads == "output"',
        "needed_before = False",
        "An activation overwrites the output that the one before it needs.",
    ),
    Mutant(
        "engine/kernels/chain.py",
        "return _joined(chain) if edge.gain == 1.0 else",
        "return _joined(chain) if edge.gain <= 1.0 else",
        "Gains below one are left out.",
    ),
    Mutant(
        "engine/kernels/chain.py",
        "tuple(p.requires_grad for p in parameters_of(link.module)),",
        "(),",
        "Frozen and learning layers share a stack.",
    ),
    Mutant(
        "engine/kernels/chain.py",
        "return self.kernel.elementwise and next(self.module.parameters(), None) is None",
        "return self.kernel.elementwise",
        "An error is pulled back over the one that an elementwise weight learns from.",
    ),
    Mutant(
        "engine/batched/groups.py",
        "members.sort(key=lambda p: (target_row[p], source_row[p], p))",
        "members.sort(key=lambda p: p)",
        "Edges of a group are left in the order in which they were added.",
    ),
    Mutant(
        "engine/batched/places.py",
        "int(positions[-1]) - first == count - 1 and bool((np.diff(positions) > 0).all())",
        "int(positions[-1]) - first == count - 1",
        "Permuted rows are taken for rows that follow each other.",
    ),
    Mutant(
        "engine/batched/places.py",
        "room = 1 << (count - 1).bit_length()",
        "room = 1 << count.bit_length() - 1",
        "Scratch for a number that is no power of two is too small.",
    ),
    Mutant(
        "engine/batched/places.py",
        "        tensor = tensor.clone()  # what an identity contributes may be other rows of this very stack",
        "        pass",
        "Rows that are added to one another read what has been added already.",
    ),
    Mutant(
        "engine/batched/places.py",
        "goal.index_add_(0, index, tensor, alpha=factor)",
        "goal[index] += factor * tensor",
        "A row that several edges add to is added to once.",
    ),
    Mutant(
        "engine/batched/edges.py",
        '        elif source.group.received and not source.moved[origins[0]]:\n            activity = "forward"\n',
        "",
        "What has not moved is read where it is put together later.",
    ),
    Mutant(
        "engine/batched/edges.py",
        "            if self.chain[link].in_place and self.chain[link + 1].kernel.fills_out:\n                places[link]",
        "            if True:\n                places[link]",
        "Errors pulled back through a link that has weights lie over what its weights learn from.",
    ),
    Mutant(
        "engine/batched/edges.py",
        "if self.chain[link].in_place and self.chain[link + 1].kernel.fills_out:",
        "if self.chain[link].in_place:",
        "An error is pulled back over a view of the target's, which others still read.",
    ),
    Mutant(
        "engine/batched/edges.py",
        "at_once = filled and place == self._pulled_over[0]",
        "at_once = filled",
        "What an edge's weights learn from lies where others leave their messages.",
    ),
    Mutant(
        "engine/batched/places.py",
        "return tensor.data_ptr(), tensor.shape, tensor.stride()",
        "return tensor.data_ptr()",
        "A weight that lies where it was, in another order, is played back as it was.",
    ),
    Mutant(
        "engine/batched/edges.py",
        'scratch: Tensor = self._arena.kept(\n            ("message", owner, count, *shape())',
        'scratch: Tensor = self._arena.kept(\n            ("message", owner, count, len(shape()))',
        "Messages of different sizes lie in the same place.",
    ),
    Mutant(
        "engine/batched/edges.py",
        'needs_output = bool(self.chain) and self.chain[-1].kernel.reads == "output" and target.overwrites_inlet',
        "needs_output = False",
        "A transfer overwrites the output that the edge's activation needs.",
    ),
    Mutant(
        "engine/batched/nodes.py",
        'self.tensor("velocity").zero_()  # another program',
        'self.tensor("velocity")  # another program',
        "Momentum goes on from the last batch.",
    ),
    Mutant(
        "engine/batched/nodes.py",
        'self.copies.append((self.tensors["forward_value"], self.tensor("value")))',
        "pass",
        "What a placed node started at is not kept.",
    ),
    Mutant(
        "engine/batched/nodes.py",
        '            error = error + (self.tensors["forward_prediction"][row] - prediction)',
        '            error = error - (self.tensors["forward_prediction"][row] - prediction)',
        "A recorded error changes with its prediction in the wrong direction.",
    ),
    Mutant(
        "engine/batched/predict.py",
        "feeding.sort(key=lambda item: int(item[0].group.positions[0]))",
        "feeding.reverse()",
        "A concatenation takes its arguments in another order.",
    ),
    Mutant(
        "engine/batched/predict.py",
        "if all(np.array_equal(edge.group.target_rows[some], rows) for edge, some in feeding):",
        "if all(len(some) == len(rows) for edge, some in feeding):",
        "Contributions are added as if their rows were in order.",
    ),
    Mutant(
        "engine/batched/errors.py",
        "    if memory.step:\n        multiplier",
        "    if True:\n        multiplier",
        "A multiplier grows by the error before the first step.",
    ),
    Mutant(
        "engine/batched/errors.py",
        "scales = scales * phase.schedule[node.group.positions[rows]]",
        "scales = scales * phase.schedule[node.group.positions[rows[0]]]",
        "Nodes of one group take the precision of the first.",
    ),
    Mutant(
        "engine/batched/errors.py",
        "if (scales == scales[0]).all():",
        "if True:",
        "Nodes of one group take the weight of the first.",
    ),
    Mutant(
        "engine/batched/errors.py",
        "scales[index] if stacked else scales))  # type",
        "scales[0] if stacked else scales))  # type",
        "An energy that nodes share weighs them by the first one's precision.",
    ),
    Mutant(
        "engine/batched/messages.py",
        "move = memory.rates.scale(move, len(node.node.shape))",
        "move = move",
        "A sample's own rate is not used.",
    ),
    Mutant(
        "engine/batched/messages.py",
        "    if len(fresh) == len(rows) == len(np.unique(rows)):",
        "    if len(fresh) == len(rows):",
        "What is added to holds what the last run left.",
    ),
    Mutant(
        "engine/batched/gradients.py",
        "factors = -factors / memory.arena.batch",
        "factors = -factors",
        "Gradients are summed over the batch.",
    ),
    Mutant(
        "engine/batched/gradients.py",
        "if before is not gradient:\n            self[parameter] = before + gradient",
        "if before is not gradient:\n            self[parameter] = gradient",
        "Of two that share a parameter, the last teaches it.",
    ),
    Mutant(
        "engine/batched/gradients.py",
        "if apart and self.keys().isdisjoint(parameters):",
        "if apart:",
        "A parameter that two groups share learns from the last.",
    ),
    Mutant(
        "engine/batched/gradients.py",
        "schedule = float(phase.schedule[position]) if memory.task.learns_each_step else 1.0",
        "schedule = 1.0",
        "An incremental rule learns a precision without the schedule.",
    ),
    Mutant(
        "engine/batched/operations.py",
        "goal.write(original.read() if goal.fixed else original.read().clone())",
        "goal.write(original.read())",
        "A value is read after it has moved.",
    ),
    Mutant(
        "engine/batched/operations.py",
        "sent = kernel.message(lower, given.to(dtype), value.read().to(dtype), output.read(), None)",
        "sent = kernel.message(call, given, value.read(), output.read(), None)",
        "Messages that should be rounded are not.",
    ),
    Mutant(
        "engine/kernels/kernel.py",
        "return bool(hooked) or overwritten or",
        "return bool(module._forward_hooks) or overwritten or",
        "A forward pre-hook or a backward hook is passed over by a kernel.",
    ),
    Mutant(
        "engine/kernels/kernel.py",
        '"forward" in module.__dict__ or "parametrizations" in module._modules',
        '"forward" in module.__dict__',
        "A parametrized weight is read as it was.",
        "torch gives a parametrized module a class of its own, of which no kernel is known.",
    ),
    Mutant(
        "engine/kernels/kernel.py",
        "return module._parameters.keys() >= {*names} and module.__dict__.keys().isdisjoint(names)",
        "return True",
        "A weight that has become something else is taken for a parameter.",
    ),
    Mutant(
        "engine/kernels/activation.py",
        "return partial(type(self).derivative, delta, at, **self.settings(module), grad_input=out)",
        "return partial(type(self).derivative, delta, at, grad_input=out)",
        "The approximate GELU sends the exact one's messages.",
    ),
    Mutant(
        "engine/kernels/elementwise.py",
        "return (module.start_dim, module.end_dim) == (1, -1)",
        "return True",
        "A flattening of some axes is computed as one of all.",
    ),
    Mutant(
        "engine/kernels/images.py",
        'zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)',
        "zeros = not isinstance(module.padding, str)",
        "A convolution with another padding is computed with zeros.",
    ),
    Mutant(
        "engine/kernels/images.py",
        "own.stride, own.padding, own.dilation, own.groups)",
        "own.stride, own.padding, 1, own.groups)",
        "A convolution forgets its dilation.",
    ),
    Mutant(
        "engine/kernels/images.py",
        "return len(shape) == 3 and not module.return_indices",
        "return len(shape) == 3",
        "A pooling that returns indices is taken.",
    ),
    Mutant(
        "engine/kernels/images.py",
        "sizes = module.kernel_size, stride, module.padding, module.dilation",
        "sizes = module.kernel_size, stride, module.padding, 1",
        "A pooling forgets its dilation.",
    ),
    Mutant(
        "engine/kernels/images.py",
        "return kernel, step, padding, dilation, module.ceil_mode",
        "return kernel, step, padding, dilation, False",
        "A pooling rounds down.",
    ),
    Mutant(
        "engine/kernels/images.py",
        "return *window, module.ceil_mode, module.count_include_pad, module.divisor_override",
        "return *window, module.ceil_mode, True, module.divisor_override",
        "Means count the padding whatever was asked.",
    ),
    Mutant(
        "engine/kernels/linear.py",
        'torch.sum(delta, -2, out=out["bias"]).mul_(factor)',
        'torch.sum(delta, -2, out=out["bias"])',
        "A bias's gradient forgets its factor.",
    ),
    Mutant(
        "engine/kernels/linear.py",
        "0 if over else 1",
        "1",
        "A message is added where it should be written.",
    ),
    Mutant(
        "engine/kernels/linear.py",
        "return weight.shape, bias is not None",
        "return weight.shape",
        "Layers with and without a bias share a stack.",
        "What a group has in common tells how many parameters learn or are frozen, too.",
    ),
    Mutant(
        "engine/kernels/normalisation.py",
        "return module.training or module.running_mean is None",
        "return module.training",
        "A normalisation without statistics fails in evaluation mode.",
    ),
    Mutant(
        "engine/kernels/normalisation.py",
        "_running(own), _by_batch(own), 0.0, own.eps",
        "_running(own), _by_batch(own), 0.0, 1e-5",
        "A normalisation forgets its eps.",
    ),
    Mutant(
        "engine/kernels/layer_norm.py",
        'owns(module, "weight", "bias")',
        "True",
        "A layer normalisation with another weight is taken.",
    ),
    Mutant(
        "engine/kernels/autograd.py",
        "        self._output = None\n        wanted",
        "        wanted",
        "A graph of autograd is asked for twice.",
    ),
    Mutant(
        "engine/kernels/autograd.py",
        "self.inputs = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]",
        "self.inputs = [tensor.detach() for tensor in inputs]",
        "A value moves while its graph still needs it.",
    ),
    Mutant(
        "simulator.py",
        "        state.counted = True\n",
        "",
        "Running statistics move once more with a second update.",
    ),
    Mutant(
        "simulator.py",
        "if len(first) == 1 and not predicting and self._single",
        "if len(first) == 1 and self._single",
        "A prediction of one sample is refused where training normalises.",
        "Predictions run in evaluation mode, in which none of torch's normalisations is refused one sample.",
    ),
    Mutant(
        "simulator.py",
        "            optimizer.load_state_dict(moments)\n            raise",
        "            raise",
        "After a diverged incremental run the optimizer keeps its moments.",
    ),
    Mutant(
        "simulator.py",
        "                    parameter.copy_(before)\n",
        "                    pass\n",
        "After a diverged incremental run the weights stay moved.",
    ),
    Mutant(
        "simulator.py",
        "if state.task.rule != self.rule:",
        "if type(state.task.rule) is not type(state.task.rule):",
        "A rule that was exchanged learns from a state of the other.",
    ),
    Mutant(
        "simulator.py",
        "        state.altered = not state.task.fingerprint.holds()\n",
        "",
        "What was frozen after the relaxation learns.",
    ),
    Mutant(
        "simulator.py",
        "scaled[parameter] = scaled.get(parameter, 0.0) - nudging.factor * gradient",
        "scaled[parameter] = scaled.get(parameter, 0.0) + nudging.factor * gradient",
        "Centred nudging adds what it should subtract.",
    ),
    Mutant(
        "simulator.py",
        "task = attrs.evolve(state.task.unwatched, target_weight=opposite.weight)",
        "task = state.task.unwatched",
        "The other side of soft centred nudging weighs as the first.",
    ),
    Mutant(
        "simulator.py",
        "parameter.grad = gradient if gradient is None or factor == 1 else factor * gradient",
        "parameter.grad = gradient",
        "Incremental learning forgets the sign of nudging.",
    ),
    Mutant(
        "simulator.py",
        "relaxation = attrs.evolve(relaxation, precision=Constant(), steps=steps, temperature=0.0, multipliers=0.0)",
        "relaxation = attrs.evolve(relaxation, precision=Constant(), steps=steps, multipliers=0.0)",
        "Predictions are noisy.",
    ),
    Mutant(
        "simulator.py",
        "nudging = None if predicting else self.nudging",
        "nudging = self.nudging",
        "Predictions are nudged.",
    ),
    Mutant(
        "simulator.py",
        "draws = (fingerprint.stochastic and not predicting) or relaxation.temperature > 0",
        "draws = fingerprint.stochastic or relaxation.temperature > 0",
        "A prediction moves torch's random state.",
    ),
    Mutant(
        "simulator.py",
        "if before.shape == (len(first), *node.shape):",
        "if before.shape[1:] == node.shape:",
        "A batch of another size starts from values of the last.",
    ),
    Mutant(
        "simulator.py",
        'if self.relaxation.start != "previous" or self._state is None or self.rule.backprop:',
        'if self.relaxation.start != "previous" or self._state is None:',
        "Backprop starts where the last run ended.",
        "Backprop leaves no node free to start anywhere.",
    ),
    Mutant(
        "simulator.py",
        "            elif not accumulate or parameter.grad is None:\n                parameter.grad = gradient",
        "            elif parameter.grad is None:\n                parameter.grad = gradient",
        "With a hooked parameter, gradients accumulate unasked.",
    ),
    Mutant(
        "simulator.py",
        "with self._turn(), in_mode(self.network, training=False):",
        "with self._turn():",
        "Predictions drop out units.",
    ),
    Mutant(
        "simulator.py",
        "key = (self.network.revision, full, partial, backprop, predicting, carried)",
        "key = (self.network.revision, full, partial, backprop, carried)",
        "A prediction's clamping is that of the last run with the same clamps.",
    ),
    Mutant(
        "clamps.py",
        "        if own != batch:",
        "        if own > batch:",
        "A clamp of fewer samples is let in.",
    ),
    Mutant(
        "clamps.py",
        "value = torch.where(mask, value, 0)\n        if",
        "if",
        "NaN under a mask is refused.",
    ),
    Mutant(
        "clamps.py",
        "if mask.dtype != torch.bool or tuple(mask.shape) not in",
        "if tuple(mask.shape) not in",
        "A mask of numbers is let in.",
    ),
    Mutant(
        "clamps.py",
        "if full or node.deterministic:",
        "if full:",
        "A start for a deterministic node is let in and lost.",
    ),
    Mutant(
        "targets.py",
        "if low < 0 or high >= classes:",
        "if low < 0 or high > classes:",
        "A class beyond the last is let in.",
    ),
    Mutant(
        "targets.py",
        "if not classes or tuple(target.shape[1:]) != without or not _whole(target):",
        "if not classes or not _whole(target):",
        "Numbers in another shape are taken for classes.",
    ),
    Mutant(
        "trace.py",
        "return self.energies[:, self.nodes.index(name)]",
        "return self.energies[:, sorted(self.nodes).index(name)]",
        "A trace gives the energy of another node.",
    ),
    Mutant(
        "training.py",
        "seed = (self.seed * EPOCHS_APART + epoch) % 2**63",
        "seed = (self.seed + epoch) % 2**63",
        "The second epoch of one seed is the first of the next.",
    ),
    Mutant(
        "training.py",
        "shown = trace if index % self.relaxed_every == 0 else None",
        "shown = trace if index == 0 else None",
        "The relaxed state is measured on the first batch alone.",
    ),
    Mutant(
        "training.py",
        "trace = simulator.infer(clamps) if relaxing and index % self.relaxed_every == 0 else None",
        "trace = simulator.infer(clamps) if relaxing else None",
        "Evaluation measures the relaxed state on every batch.",
    ),
    Mutant(
        "training.py",
        'self._schedule("epoch", record.validation or record.train)',
        'self._schedule("epoch", record.train)',
        "A plateau is looked for in training.",
    ),
    Mutant(
        "training.py",
        "given = {name: clamp for name, clamp in clamps.items() if name != self.target}",
        "given = {**clamps}",
        "Evaluation is given the answer.",
    ),
    Mutant(
        "training.py",
        "            before = copy.deepcopy(self._state())\n",
        "            before = self._state()\n",
        "A checkpoint that fails leaves what it has overwritten.",
    ),
    Mutant(
        "training.py",
        "                self._take_over(before)\n                raise",
        "                raise",
        "A checkpoint that fails half-way stays half taken over.",
    ),
    Mutant(
        "training.py",
        '            self.scheduler.load_state_dict(state["scheduler"])',
        "            pass",
        "A scheduler starts anew after a checkpoint.",
    ),
    Mutant(
        "training.py",
        "first = len(self.history.records) + 1",
        "first = 1",
        "A second fit counts its epochs from one.",
    ),
    Mutant(
        "training.py",
        "            self._stopped = False\n            first",
        "            first",
        "A trainer that was stopped never trains again.",
    ),
    Mutant(
        "training.py",
        "fallen = min(1.0, (step - rising) / max(1.0, steps - rising))",
        "fallen = (step - rising) / max(1.0, steps - rising)",
        "The cosine rises again after its end.",
    ),
    Mutant(
        "training.py",
        "return 1 + (peak - 1) * step / rising",
        "return peak * step / rising",
        "The warm-up starts at zero.",
    ),
    Mutant(
        "training.py",
        "with in_mode(network, training=False), random_state_kept():",
        "with in_mode(network, training=False):",
        "Evaluation moves the random state.",
    ),
    Mutant(
        "training.py",
        "                for callback in self.callbacks:\n                    callback.on_fit_end(self, self.history)",
        "                for callback in self.callbacks[:1]:\n                    callback.on_fit_end(self, self.history)",
        "Only the first callback is told of the end.",
    ),
    Mutant(
        "training.py",
        "        if self.scheduler is None or moment != self.schedule_per:",
        "        if self.scheduler is None:",
        "A scheduler steps by batch and by epoch.",
    ),
    Mutant(
        "callbacks.py",
        'number > self.best if self.mode == "max" else number < self.best',
        'number >= self.best if self.mode == "max" else number <= self.best',
        "Of equal epochs the last is kept.",
    ),
    Mutant(
        "callbacks.py",
        "return self.patience is not None and waited >= self.patience",
        "return self.patience is not None and waited > self.patience",
        "Patience lasts an epoch longer.",
    ),
    Mutant(
        "callbacks.py",
        "self._weights = {name: tensor.detach().clone() for name, tensor in state.items()}",
        "self._weights = {name: tensor.detach() for name, tensor in state.items()}",
        "The best weights move on.",
    ),
    Mutant(
        "callbacks.py",
        "if better and not math.isnan(number):",
        "if better:",
        "An epoch of NaN is the best.",
    ),
    Mutant(
        "callbacks.py",
        "if record.epoch % self.every == 0:",
        "if record.epoch % self.every == 1 % self.every:",
        "Checkpoints are written an epoch early.",
    ),
    Mutant(
        "callbacks.py",
        "        self._batches += 1\n",
        "",
        "TensorBoard writes all batches over each other.",
    ),
    Mutant(
        "callbacks.py",
        'measured = record.train if part == "train" else record.validation',
        "measured = record.train",
        "A history gives training for validation.",
    ),
    Mutant(
        "metrics.py",
        "[node.energy_weight * node.energy.mean() for node in nodes]",
        "[node.energy.mean() for node in nodes]",
        "The relaxed energy forgets weights.",
    ),
    Mutant(
        "metrics.py",
        "(output.argmax(axis) == target.argmax(axis))",
        "(output.argmax(-1) == target.argmax(-1))",
        "Accuracy looks along the last axis.",
    ),
    Mutant(
        "metrics.py",
        "return {name: total / samples for name, (total, samples) in sums.items() if samples}",
        "return {name: total / self._batches for name, (total, samples) in sums.items() if samples}",
        "Means are over batches.",
    ),
    Mutant(
        "io.py",
        "if metadata.get(DIGEST) != _digest(tensors, metadata[HEADER]):",
        "if metadata.get(DIGEST) is None:",
        "A damaged file is read.",
    ),
    Mutant(
        "io.py",
        'return {"tuple": items} if isinstance(tree, tuple) else items',
        "return items",
        "Tuples come back as lists.",
    ),
    Mutant(
        "io.py",
        "if shapes[0] != shapes[1]:",
        "if shapes[1] is None:",
        "A state of other shapes is let in.",
    ),
    Mutant(
        "io.py",
        'if header["kind"] != kind:',
        "if not kind:",
        "A file of another kind is read.",
    ),
    Mutant(
        "saving/__init__.py",
        "if not _alike(value, again):",
        "if value is None and again is not None:",
        "What does not come back alike is kept.",
    ),
    Mutant(
        "saving/__init__.py",
        "for name in sorted((inventories[0].keys() ^ inventories[1].keys()) - places):",
        "for name in sorted((inventories[1].keys() - inventories[0].keys()) - places):",
        "What belongs to no part is lost silently.",
    ),
    Mutant(
        "saving/reading.py",
        '            edge.training = record["training"]\n',
        "",
        "An edge comes back in training mode.",
    ),
    Mutant(
        "saving/reading.py",
        'return nn.Parameter(value, requires_grad=record["requires_grad"])',
        "return nn.Parameter(value)",
        "Frozen parameters come back thawed.",
    ),
    Mutant(
        "saving/reading.py",
        "            node.log_precision = learned\n",
        "            pass\n",
        "A learned precision comes back at its start.",
    ),
    Mutant(
        "saving/reading.py",
        '                gain=record["gain"],\n',
        "",
        "Gains are lost.",
    ),
    Mutant(
        "saving/reading.py",
        '        for name, part in parts.items():\n            part.training = record["training"][name]\n',
        "",
        "Modes of modules are lost.",
    ),
    Mutant(
        "saving/reading.py",
        'if parts.keys() != record["training"].keys():',
        "if False:",
        "A module that is built with other parts is let in.",
    ),
    Mutant(
        "saving/writing.py",
        "        if id(tensor) in self._tensor_numbers:\n            return self._tensor_numbers[id(tensor)]\n",
        "",
        "Tied parameters come apart.",
    ),
    Mutant(
        "saving/writing.py",
        "        if id(module) in self._numbers:\n            return self._numbers[id(module)]\n",
        "",
        "Shared modules come apart.",
    ),
    Mutant(
        "saving/writing.py",
        "if tensor.numel() and view in self._views:",
        "if False:",
        "Tensors that share memory come apart silently.",
    ),
    Mutant(
        "saving/writing.py",
        'if any(getattr(module, hooks) for hooks in HOOKS) or "forward" in vars(module):',
        "if any(getattr(module, hooks) for hooks in HOOKS):",
        "A replaced forward is lost.",
    ),
    Mutant(
        "saving/registry.py",
        "if _full_name(other.kind) != _full_name(kind):",
        "if False:",
        "Another class takes a name that is taken.",
    ),
    Mutant(
        "arguments.py",
        "if type(value) is not type(default) or isinstance(value, Tensor | np.ndarray):",
        "if isinstance(value, Tensor | np.ndarray):",
        "An integer that equals a float default is left out.",
    ),
    Mutant(
        "arguments.py",
        "return value is not None  # bias=True",
        "return True  # bias=True",
        "A layer comes back with a bias.",
    ),
    Mutant(
        "conversion.py",
        "last = place if mapped else None",
        "last = place",
        "A nonlinearity before the first map makes a latent.",
    ),
    Mutant(
        "conversion.py",
        "        if module.training != mode:\n            module.train(mode)",
        "        if module.training != mode:\n            pass",
        "Modes of a model change as it is converted.",
        "Building a network leaves modes as they are: what is left out is a guard.",
    ),
    Mutant(
        "conversion.py",
        "known[name] = node.predict_from_prior(values[0].shape[0])",
        "known[name] = node.predict_from_prior(1)",
        "A prior in an exported module is one sample.",
    ),
    Mutant(
        "conversion.py",
        "place = inside[-1]",
        "place = inside[0]",
        "A latent after a block is put after its first layer.",
    ),
    Mutant(
        "data.py",
        "order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))",
        "order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))",
        "Every seed splits alike.",
    ),
    Mutant(
        "data.py",
        "images = torch.from_numpy(pixels).to(torch.float32) / 16",
        "images = torch.from_numpy(pixels).to(torch.float32) / 15",
        "Digits reach beyond one.",
    ),
    Mutant(
        "data.py",
        "flipped = torch.rand((count, 1), generator=generator, device=drawn).to(device) < 0.5",
        "flipped = torch.rand((1, 1), generator=generator, device=drawn).to(device) < 0.5",
        "All images of a batch are flipped together.",
    ),
    Mutant(
        "data.py",
        "columns = left + torch.where(flipped, columns.flip(0), columns)",
        "columns = torch.where(flipped, columns.flip(0), left + columns)",
        "Flipped images are not cropped.",
    ),
    Mutant(
        "data.py",
        "return tuple(attrs.evolve(part, images=(part.images - mean) / deviation) for part in (train, *others))",
        "return tuple(attrs.evolve(part, images=(part.images - part.images.mean()) / deviation) for part in (train, *others))",
        "The test set is scaled by its own mean.",
    ),
    Mutant(
        "data.py",
        "if len(content) != expected or note:",
        "if len(content) < expected or note:",
        "Bytes beyond an idx file's end are passed over.",
    ),
    Mutant(
        "data.py",
        "if digest.hexdigest() != md5:",
        "if not md5:",
        "A download that was changed on the way is kept.",
    ),
    Mutant(
        "data.py",
        "(images - images.new_tensor(mean).view(-1, 1, 1)) / images.new_tensor(std).view(-1, 1, 1)",
        "(images - images.new_tensor(mean).view(-1, 1, 1)) * images.new_tensor(std).view(-1, 1, 1)",
        "Images are multiplied by their deviation.",
    ),
    Mutant(
        "diagnosis.py",
        "return occupied.amax(1) / occupied.amin(1)",
        "return occupied.amax(1) / occupied.mean(1)",
        "An imbalance over the mean.",
    ),
    Mutant(
        "diagnosis.py",
        "reached = level_energies(trace) > above",
        "reached = level_energies(trace) > 0",
        "Arrivals ignore their threshold.",
    ),
    Mutant(
        "diagnosis.py",
        "return Curvature(smallest, largest, 2 / largest",
        "return Curvature(smallest, largest, 1 / largest",
        "The safe rate is half of it.",
    ),
    Mutant(
        "diagnosis.py",
        "spread = spread + torch.diag(1 / own.detach().expand(node.shape).flatten())",
        "spread = spread + torch.eye(node.shape[0], dtype=spread.dtype)",
        "The closed form forgets precisions.",
    ),
    Mutant(
        "diagnosis.py",
        "progress = 1 - math.sqrt(gone / whole) if whole > 0 else math.nan",
        "progress = 1 - gone / whole if whole > 0 else math.nan",
        "Progress is in squares.",
    ),
    Mutant(
        "verify/gradients.py",
        'got, note = torch.zeros_like(expected), " (its grad is None)"',
        "continue",
        "Missing gradients pass.",
    ),
    Mutant(
        "verify/gradients.py",
        "expected = torch.stack(parts).sum(0) / case.batch",
        "expected = torch.stack(parts).sum(0)",
        "Gradients are compared with sums over the batch.",
    ),
    Mutant(
        "verify/gradients.py",
        "compare(what, moved[units], descent[units], tolerance, size, case)",
        "compare(what, moved[units], descent[units], size, size, case)",
        "Displacements are compared loosely.",
    ),
    Mutant(
        "verify/gradients.py",
        "        for step, found in enumerate(recorder.gradients):\n",
        "        for step, found in enumerate(recorder.gradients[:1]):\n",
        "Of the incremental rule only the first step is compared.",
    ),
    Mutant(
        "verify/agreement.py",
        "if what not in other.tensors or (got is None) != (expected is None):",
        "if what not in other.tensors:",
        "A gradient of None passes for a tensor.",
    ),
    Mutant(
        "verify/agreement.py",
        "if oracle.refusal != other.refusal:",
        "if oracle.refusal and not other.refusal:",
        "An engine may refuse what the other runs.",
    ),
    Mutant(
        "verify/agreement.py",
        '            for name, edge in own.network.edges.items():\n                tensors[f"run {run}: message of edge {name!r}"] = edge.message.clone()\n',
        "",
        "Messages are not compared.",
    ),
    Mutant(
        "verify/locality.py",
        "    _check_time(case, engine, tolerance)\n    _check_space",
        "    _check_space",
        "An update that remembers passes for local.",
    ),
    Mutant(
        "verify/locality.py",
        "        with shifted(parameters):\n",
        "        with shifted([]):\n",
        "Parameters elsewhere may be read.",
    ),
    Mutant(
        "verify/descent.py",
        "if not rise <= tolerance * max(1.0, abs(float(after))):",
        "if rise > 1e9:",
        "No rise is ever told.",
    ),
    Mutant(
        "verify/comparing.py",
        "    if got.shape != expected.shape:\n",
        "    if got.dim() != expected.dim():\n",
        "Shapes that broadcast pass for equal.",
    ),
    Mutant(
        "verify/comparing.py",
        "difference = difference.masked_fill(got.isnan() & expected.isnan(), 0.0)",
        "difference = difference.masked_fill(got.isnan(), 0.0)",
        "NaN passes for any number.",
    ),
    Mutant(
        "verify/kernels.py",
        "        _compare_gradients(kernel, call, delta, value, gradients, tolerance)\n",
        "",
        "A kernel's gradients are not compared.",
    ),
    Mutant(
        "verify/kernels.py",
        '            _same(module, "message", sent, message, tolerance)\n',
        "",
        "A kernel's messages are not compared.",
    ),
    Mutant(
        "verify/kernels.py",
        "for count in (None, 2) if kernel.stacks else (None,):",
        "for count in (None,):",
        "A kernel is not compared on stacks.",
    ),
    Mutant(
        "verify/kernels.py",
        "for wanted in (names, *([name] for name in names)) if names else ():",
        "for wanted in (names,) if names else ():",
        "A kernel is not compared with some parameters frozen.",
    ),
    Mutant(
        "verify/backprop.py",
        "got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad",
        "got = expected[name] if parameter.grad is None else parameter.grad",
        "A missing gradient passes for backprop's.",
    ),
    Mutant(
        "topologies/mlp.py",
        "1 / math.sqrt(before) if k == 1 else 1 / before if last else 1 / math.sqrt(before * depth)",
        "1 / math.sqrt(before) if k == 1 else 1 / before if last else 1 / math.sqrt(before)",
        "Hidden gains of muPC forget the depth.",
    ),
    Mutant(
        "topologies/mlp.py",
        'activated = latents == "before" and depth > 1',
        'activated = latents == "before"',
        "The input is put through an activation.",
    ),
    Mutant(
        "topologies/mlp.py",
        "nn.init.normal_(linear.weight, std=1 / math.sqrt(before) if std is None else std)",
        "nn.init.normal_(linear.weight, std=1 / math.sqrt(after) if std is None else std)",
        "Weights are scaled by the fan-out.",
    ),
    Mutant(
        "topologies/mlp.py",
        "std, gains = None, (1.0, 1.0, gain, 1.0)",
        "std, gains = None, (1.0, gain, gain, 1.0)",
        "Both layers of a branch have the gain.",
    ),
    Mutant(
        "topologies/resnet.py",
        "2 if stage and place == 0 else 1",
        "2 if place == 0 else 1",
        "The first stage has a stride.",
    ),
    Mutant(
        "topologies/resnet.py",
        "shape = channels, -(-height // stride), -(-width // stride)",
        "shape = channels, height // stride, width // stride",
        "Odd images lose a row.",
    ),
    Mutant(
        "topologies/vgg.py",
        "return max(1, round(width * channels))",
        "return max(1, int(width * channels))",
        "Widths are rounded down.",
    ),
    Mutant(
        "topologies/vgg.py",
        '"VGG7": VGGDesign.parse("128p 128 256p 256° 512p 512°")',
        '"VGG7": VGGDesign.parse("128p 128 256p 256 512p 512°")',
        "VGG7 pads a convolution that has no padding.",
    ),
    Mutant(
        "topologies/vgg.py",
        '        node = net.add_node(f"linear{place}", (after,), transfer=activation())\n',
        '        node = net.add_node(f"linear{place}", (after,))\n',
        "Hidden linear layers are linear.",
    ),
    Mutant(
        "engine/problem.py",
        "if (step + 1) % every == 0)",
        "if step % every == 0)",
        "A stream's frames come a step late.",
    ),
    Mutant(
        "engine/problem.py",
        "value=self.frames[step // self.every])",
        "value=self.frames[step % len(self.frames)])",
        "A stream's frames do not stay for their steps.",
    ),
    Mutant(
        "engine/local_rules.py",
        "            shown[name] = torch.lerp(state.forward_prediction[name], shown[name], state.batch.nudge)\n",
        "            pass\n",
        "The reference clamps later frames of a nudged target in full.",
    ),
    Mutant(
        "engine/planning/liveness.py",
        "changed = move | wiring.changing(step)",
        "changed = move",
        "What reads a stream is not evaluated anew.",
    ),
    Mutant(
        "engine/planning/plan.py",
        "        once &= ~wiring.streamed  # what was sent was another frame's\n",
        "",
        "A target learns from the error of an earlier frame.",
    ),
    Mutant(
        "engine/problem.py",
        'if p.node in following or set(p.of or ()) - {"value"})',
        'if set(p.of or ()) - {"value"})',
        "Recorded values of deterministic nodes are a step stale.",
    ),
    Mutant(
        "engine/batched/nodes.py",
        'return self.tensors["forward_prediction"][row] + self.tensors["displacement"][row]',
        'return self.tensors["value"][row]',
        "A recorded value lacks what has been received since it was formed.",
    ),
    Mutant(
        "engine/problem.py",
        "if part.log_precision is None and node not in self.weighed else None",
        "if part.log_precision is None else None",
        "The precision of a trial is planned as the node's own.",
    ),
    Mutant(
        "engine/batched/stages.py",
        "if not phase.learn.any() or (self._task.learns_each_step and not self._task.rule.usual):",
        "if not phase.learn.any():",
        "A rule of a user's own is not asked at every step.",
    ),
    Mutant(
        "engine/kernels/images.py",
        "indices.to(torch.int16 if count <= 2**15 else torch.int32)",
        "indices.to(torch.int16)",
        "Places in large images are kept in too few bytes.",
    ),
    Mutant(
        "engine/kernels/pooled.py",
        "kept.copy_(indices)",
        "kept.copy_(indices[:1])",
        "The first sample's chosen units count for all of a part.",
    ),
    Mutant(
        "engine/batched/stages.py",
        "taught = attrs.evolve(phase, learn=phase.learn & now)",
        "taught = attrs.evolve(phase, learn=phase.learn & (now if alone else ~now))",
        "What images teach one by one is all that is learned.",
    ),
    Mutant(
        "engine/batched/compiled.py",
        "calls = (count - 1) // self._at_a_time",
        "calls = count // self._at_a_time",
        "The last of compiled steps leaves nothing but what a next one reads.",
    ),
    Mutant(
        "engine/batched/compiled.py",
        "if self._places != [*map(where, self._weights)]:",
        "if False:",
        "Compiled steps read weights where they lay before.",
    ),
    Mutant(
        "engine/batched/compiled.py",
        "count -= self._compile(count)",
        "self._compile(count)",
        "Steps that are taken on the way to compiling are taken again.",
    ),
    Mutant(
        "engine/batched/compiled.py",
        "storage.carried.update({*pieces} - storage.written)",
        "storage.carried.update({*pieces})",
        "Compiled steps write back what no next one reads.",
    ),
    Mutant(
        "engine/batched/compiled.py",
        'if (alpha := options.get("alpha", 1)) != 1:',
        'if (alpha := options.get("alpha", 1)) > 1:',
        "A row's product leaves out its factor in compiled steps.",
    ),
    Mutant(
        "engine/batched/compiled.py",
        'alpha=options.get("beta", 1)) if added',
        "alpha=1) if added and options",
        "What a row's product is added to counts whole in compiled steps.",
    ),
    Mutant(
        "engine/batched/compiled.py",
        "first = PRODUCTS[operation]",
        "first = 0",
        "A row's product takes what it is added to for its first factor.",
    ),
    Mutant(
        "engine/batched/compiled.py",
        "found = self._call(aten.permute.default, found, inverse)",
        "found = self._call(aten.permute.default, found, order)",
        "Tensors with their axes in another order are read wrongly by compiled steps.",
    ),
    Mutant(
        "engine/batched/compiled.py",
        "made = self._call(aten.permute.default, made, order)",
        "made = self._call(aten.permute.default, made, _)",
        "Tensors with their axes in another order are written wrongly by compiled steps.",
    ),
    Mutant(
        "engine/batched/compiled.py",
        "if not written and call.operation.is_view:",
        "if not written and False:",
        "A view counts as something that a compiled step makes.",
    ),
    Mutant(
        "engine/batched/compiled.py",
        "storage.bounds.update(_span(tensor))",
        "storage.bounds.update(_span(tensor)[:1])",
        "Compiled steps cut storages only where an operation begins.",
    ),
    Mutant(
        "engine/batched/compiled.py",
        "return [vector]\n        first = cuts[0]",
        "return [vector]\n        first = 0",
        "Compiled steps cut a part of a storage as if it began at 0.",
    ),
    Mutant(
        "engine/batched/playback.py",
        "            cell.tensor = left\n",
        "            pass\n",
        "What follows a run that was played back finds what another has left.",
    ),
    Mutant(
        "engine/batched/playback.py",
        "            saved.update(kept)\n",
        "            pass\n",
        "Kernels find what they have kept of another run than the one that was played back.",
    ),
    Mutant(
        "engine/batched/playback.py",
        "        if addresses != self._addresses:\n",
        "        if not self._addresses:\n",
        "A run is played back on weights that lie elsewhere since.",
    ),
    Mutant(
        "engine/batched/playback.py",
        "if self.refused or self._latest is None or self._places() != self._addresses:",
        "if self.refused or self._latest is None:",
        "Learning is played back on weights that lie elsewhere since the run.",
    ),
    Mutant(
        "engine/batched/playback.py",
        "if kept is None or kept.shape != tensor.shape:",
        "if kept is None:",
        "A mask by unit is kept in the place of one by sample.",
    ),
    Mutant(
        "engine/batched/playback.py",
        "self._play(stage, work, self._latest.later)",
        "self._play(stage, work, self._captured)",
        "Learning is played back after a run that was not.",
    ),
    Mutant(
        "engine/batched/playback.py",
        "attrs.evolve(batch, clamps=clamps, precision=precision)",
        "attrs.evolve(batch, clamps=clamps)",
        "Every trial has the precisions of the one that was captured.",
    ),
    Mutant(
        "engine/batched/playback.py",
        "self._found.update(_copies(played.gradients))",
        "self._found.update(played.gradients)",
        "Gradients that the caller keeps are overwritten by the next batch.",
    ),
    Mutant(
        "graph/network.py",
        "self.add_edge(end, node, gain=-1.0)",
        "self.add_edge(end, node)",
        "A pathway compares with the wrong sign.",
    ),
    Mutant(
        "verify/rules.py",
        "with _showing(watched, seed + 1), _shifted_all(watched):",
        "with _showing(watched, seed):",
        "A rule may read other nodes and weights.",
    ),
    Mutant(
        "verify/declarations.py",
        "if not bool((force == 0).all()):",
        "if not bool((force < 1).all()):",
        "An energy that pulls at its prediction passes.",
    ),
)


def mutated(mutant: Mutant, project: Path = PROJECT) -> str:
    """The file as the defect leaves it.

    Raises:
        LookupError: the text is not found exactly once.
    """
    text = (project / "pcsim" / mutant.file).read_text(encoding="utf-8")
    found = text.count(mutant.old)
    if found != 1:
        raise LookupError(f"{mutant.file}: {mutant.old!r} is found {found} times, expected once")
    return text.replace(mutant.old, mutant.new)


def nearest(mutant: Mutant) -> list[str]:
    """Paths of the nearest test files, those that tell most first."""
    prefix = max((beginning for beginning in NEAREST if mutant.file.startswith(beginning)), key=len)
    return [f"tests/test_{name}.py" for name in NEAREST[prefix]]


class FirstFailure:
    """Notes the first test that fails."""

    def __init__(self) -> None:
        self.name = ""

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.name = self.name or f"{report.nodeid} (as it is collected)"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.name = self.name or report.nodeid


def fails(tests: list[str], *without: str) -> str:
    """Which test of these fails first, in the folder at hand; empty where none does."""
    first = FirstFailure()
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--hypothesis-profile=unshrunk"]
    left_out = [f"--ignore={path}" for path in without]
    ended = pytest.main([*options, *left_out, *tests], [first])
    return first.name or ("" if ended == pytest.ExitCode.OK else f"pytest ended with {ended!r}")


def outcome(mutant: Mutant, folder: Path, *, nearest_only: bool) -> tuple[str, str]:
    """Plant a defect in a copy of the project in a folder, and run the tests there: what became of it, what tells."""
    if mutant.equivalent:
        return "equivalent", mutant.equivalent
    try:
        text = mutated(mutant)
    except LookupError as stale:
        return "STALE", str(stale)
    copy_the_project(folder)
    (folder / "pcsim" / mutant.file).write_text(text, encoding="utf-8")
    failed = _tested(folder, mutant, nearest_only=nearest_only)
    return ("caught", failed) if failed else ("SURVIVED", "")


def _tested(folder: Path, mutant: Mutant, *, nearest_only: bool) -> str:
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(silence, stream.fileno())
    os.chdir(folder)
    sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry).resolve() not in (PROJECT, HERE))]
    os.environ |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGALRM, _never_ends)
    signal.alarm(LONGEST)
    tests = nearest(mutant)
    return fails(tests) or ("" if nearest_only else fails(["tests"], *tests, "tests/test_mutants.py"))


HERE = Path(__file__).resolve().parent


def _never_ends(*_: object) -> None:
    raise TimeoutError(f"the tests have not ended after {LONGEST} seconds")


def copy_the_project(folder: Path) -> None:
    """Copy what the tests need, without byte code, which could be that of another defect."""
    for pattern in COPIED:
        for source in PROJECT.glob(pattern):
            if source.is_dir():
                shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, folder / source.name)


class Run:
    """One defect in a process of its own, which it may crash.

    Args:
        number: of the defect.
        scratch: where the copy of the project goes.
        nearest_only: run the nearest test files alone.
    """

    def __init__(self, number: int, scratch: Path, *, nearest_only: bool) -> None:
        self.number, self._folder, fork = number, scratch / str(number), multiprocessing.get_context("fork")
        self._folder.mkdir()
        self._told, telling = fork.Pipe(duplex=False)
        self._process = fork.Process(target=self._tell, args=(telling, nearest_only))
        self._process.start()
        telling.close()

    def _tell(self, telling: Connection, nearest_only: bool) -> None:
        telling.send(outcome(MUTANTS[self.number], self._folder, nearest_only=nearest_only))

    @property
    def sentinel(self) -> int:
        """Ready once the process has ended."""
        return self._process.sentinel

    def ended(self) -> tuple[str, str]:
        """What became of the defect."""
        self._process.join()
        shutil.rmtree(self._folder)
        try:
            came: tuple[str, str] = self._told.recv()
        except EOFError:
            return "caught", f"the tests crash ({self._process.exitcode})"
        return came


def main() -> None:
    """Run the chosen defects; ends with 1 where one survives or is stale."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("numbers", type=int, nargs="*", help="of the defects, from 0; all by default")
    parser.add_argument("--file", action="append", default=[], help="those of files whose name begins so")
    parser.add_argument("--nearest", action="store_true", help="run the nearest test files alone")
    parser.add_argument("--processes", type=int, default=1, help="so many at a time")
    parser.add_argument("--list", action="store_true", help="show them, and run none")
    given = parser.parse_args()
    chosen = [
        number
        for number, mutant in enumerate(MUTANTS)
        if not (given.numbers or given.file)
        or number in given.numbers
        or any(mutant.file.startswith(beginning) for beginning in given.file)
    ]
    if given.list:
        for number in chosen:
            print(f"{number:3} {MUTANTS[number].file}: {MUTANTS[number].reason}")
        return
    counts = dict.fromkeys(("caught", "SURVIVED", "STALE", "equivalent"), 0)
    runs: dict[int, Run] = {}
    with tempfile.TemporaryDirectory() as scratch:
        while chosen or runs:
            while chosen and len(runs) < given.processes:
                run = Run(chosen.pop(0), Path(scratch), nearest_only=given.nearest)
                runs[run.sentinel] = run
            for sentinel in wait(list(runs)):
                run = runs.pop(sentinel)  # type: ignore[arg-type]
                what, told = run.ended()
                counts[what] += 1
                mutant = MUTANTS[run.number]
                print(f"{run.number:3} {what:10} {told}   [{mutant.file}: {mutant.reason}]", flush=True)
    tried = counts["caught"] + counts["SURVIVED"]
    share = f" ({counts['caught'] / tried:.1%})" if tried else ""
    print(", ".join(f"{count} {what.lower()}" for what, count in counts.items()) + share)
    sys.exit(1 if counts["SURVIVED"] or counts["STALE"] else 0)


if __name__ == "__main__":
    main()
