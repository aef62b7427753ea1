"""The list of defects in ``mutants.py`` still fits the code; whether they are caught is for that script to say."""

from __future__ import annotations

import ast

import pytest
from mutants import MUTANTS, PROJECT, mutated, nearest


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_defects_of_a_file_can_be_planted(file: str) -> None:
    for mutant in (mutant for mutant in MUTANTS if mutant.file == file):
        ast.parse(mutated(mutant))
        assert mutant.new != mutant.old
        assert mutant.reason.endswith(".")
        assert all((PROJECT / path).is_file() for path in nearest(mutant))


def test_they_are_many_and_everywhere() -> None:
    rooms = {mutant.file.partition("/")[0].removesuffix(".py") for mutant in MUTANTS}
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS) >= 100
    assert rooms >= {"graph", "dynamics", "engine", "simulator", "training", "saving", "conversion", "data", "verify"}
    assert "topologies" in rooms
