"""Arguments of a stranger: seeds, names, paths; refused with exit code 2, and nothing is made."""

import os

import pytest

from hostile import command
from running import DEMO

SEEDS = ["0..99999999999", "9..0", "-1..2", "0,0", "a", "1" * 5000, "0..\u0663x"]


@pytest.mark.parametrize("seeds", SEEDS)
def test_seeds_of_a_stranger(place, seeds):
    code, _, err = command("run", DEMO, "--seeds", seeds, "--out", "made")
    assert code == 2 and "--seeds" in err and len(err) < 300 and not os.path.exists("made")


LONG = "a" * 5000
ARGUMENTS = [
    ("stage", "sft", "--student", LONG), ("stage", "../x"), ("stage", "sft", "--method", "../x"),
    ("stage", "opd", "--student", "./x", "--teacher", "=", "--teacher", "a=b=c"), ("plan", LONG),
    ("stage", "sft", "seed=1", "--out", "x/" * 3000), ("plan", "/dev/zero"), ("show", "../../x"),
    ("validate", "/proc/self/mem"), ("validate", "."), ("show", LONG), ("ls", "../stages"),
    ("report", LONG), ("claims", "/dev/null"), ("status", "/proc"), ("resume", "/dev/null"),
    ("cp", "mimo", "/dev/null/x"), ("run", "mimo", "--from", "/dev/null"),
    ("run", "mimo", "--only", "\x1b"), ("run", "mimo", "--size", "../x"),
    ("show", "stages/../cli"), ("show", "stages/__init__"),
]  # fmt: skip


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments_of_a_stranger(place, arguments):
    before = sorted(os.listdir(place))
    code, out, err = command(*arguments)
    assert code == 2 and len(err) > 20 and not out and sorted(os.listdir(place)) == before
    assert all(c.isprintable() or c == "\n" for c in err)


def test_what_is_printed_cannot_steer_a_terminal(place):
    code, _, err = command("validate", DEMO, "stages.sft.student=\x1b[2J\x07\r")
    assert code == 2 and "\x1b" not in err and "\x07" not in err and "\\x1b[2J" in err
