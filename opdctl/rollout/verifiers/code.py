"""Python answers against a row's unit tests, in a sandbox: the code domain of MiMo and DeepSeek.

A row's tests are one of
- Python that runs after the answer, a text or a list of texts, as in HumanEval and MBPP;
- cases of standard input and output, ``{"inputs": [...], "outputs": [...]}`` or a list of
  ``{"input": ..., "output": ...}``, themselves or as JSON text (APPS, TACO, LiveCodeBench).
All must pass. The last fenced block of an answer is run, or all of it. Expected outputs of cases
never enter the sandbox; assertions do, and code that searches its interpreter's frames can read
them. ``_sandbox.py`` and docs/data.md say what the sandbox guards against. Verdicts near the limits
depend on how busy the machine is.
"""

from __future__ import annotations

import contextlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from opdctl.config.schema import key
from opdctl.errors import UsageError
from opdctl.rollout.verifiers._sandbox import Limits, Sandbox
from opdctl.rollout.verifiers._verifier import SingleAnswerVerifier, last_fenced_block
from opdctl.types import Prompt


class Code(SingleAnswerVerifier):
    """Python that passes its row's unit tests, run in a sandbox."""

    revision = 1

    @dataclass(kw_only=True)
    class Config:
        """The keys of a sandbox and of where the tests are."""

        tests_column: str = key("tests", "column of the tests: asserts, or inputs and outputs")
        entry_column: str = key(
            "", "column of the name that the tests' check() is given, as HumanEval's"
        )
        python: str = key("", "interpreter that runs them; empty: the one that runs opdctl")
        seconds: int = key(5, "CPU seconds of one run", least=1)
        wall: float = key(15.0, "seconds of one run on the clock", least=0.5)
        memory_mib: int = key(1024, "address space of each of its processes, MiB", least=128)
        file_mib: int = key(16, "largest file that it may write, and most output, MiB", least=1)
        disk_mib: int = key(64, "of all its files, where it has a disk of its own, MiB", least=1)
        processes: int = key(16, "most processes and threads", least=1)
        isolation: bool = key(
            True, "refuse to run where the kernel grants no namespaces; false: limits alone"
        )
        jobs: int = key(0, "answers at once; 0 is one per core", role="operational", least=0)

    @staticmethod
    def needs_answer(config) -> bool:
        """Return False: the tests decide."""
        return False

    @staticmethod
    def item(config, row: dict) -> dict:
        """Return the tests of a row.

        Raises:
            KeyError: the row lacks a column.
            ValueError: the column holds no tests, or in no known form.
        """
        tests = parse_tests(row[config.tests_column])
        if config.entry_column:
            if "cases" in tests:
                raise ValueError("entry_column goes with tests in Python, and these are cases")
            name = str(row[config.entry_column])
            if not name.isidentifier():
                raise ValueError(
                    f"{config.entry_column} is {name!r:.60}, not the name of a function"
                )
            tests["code"] = [*tests["code"], f"check({name})"]
        return {"tests": tests}

    def __init__(self, config, ctx, domain: str) -> None:
        super().__init__(config, ctx, domain)
        limits = Limits(
            seconds=config.seconds,
            wall=config.wall,
            memory_mib=config.memory_mib,
            file_mib=config.file_mib,
            disk_mib=config.disk_mib,
            processes=config.processes,
        )
        self.sandbox = Sandbox(limits, python=config.python)
        if config.isolation and not self.sandbox.isolated:
            raise UsageError(
                f"data.{domain}.verifier.code.isolation: the kernel grants no namespaces here",
                "run as root or allow user namespaces; isolation=false: limits alone",
            )
        if not self.sandbox.isolated:
            risk = "solutions run under limits alone: they can reach the network and files"
            print(f"warning: data.{domain}.verifier.code: {risk}", flush=True)

    def score(self, answers: list[tuple[Prompt, str]]) -> list[float | Exception]:
        """Return a verdict for each (prompt, answer), running ``jobs`` at once."""
        jobs = self.config.jobs or len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(jobs) as pool:
            jobs_done = [pool.submit(super(Code, self).score, [answer]) for answer in answers]
            try:
                return [job.result()[0] for job in jobs_done]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def grade(self, prompt: Prompt, answer: str) -> float:
        """Return 1 if all tests pass, else 0; the first that fails ends it.

        Raises:
            RuntimeError: the sandbox broke down.
            Interrupted: a stop was asked for.
        """
        self.ctx.check()
        solution, tests = last_fenced_block(answer), prompt.item["tests"]
        if "code" in tests:
            return self.sandbox.run(solution, tests=tests["code"]).passed
        for entered, expected in tests["cases"]:
            ending = self.sandbox.run(solution, stdin=entered)
            if not ending.clean or without_outer_space(ending.output) != without_outer_space(
                expected
            ):
                return 0.0
        return 1.0


def without_outer_space(text: str) -> list[str]:
    """Return the lines without white space at their ends, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def parse_tests(value: Any) -> dict[str, list]:
    """Return ``{"code": [...]}`` or ``{"cases": [[input, output], ...]}``.

    Raises:
        ValueError: there is no test, or in another form.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):  # Python may begin so too
            value = json.loads(value)
    if isinstance(value, str):
        value = [value]
    if isinstance(value, dict) and {"inputs", "outputs"} <= value.keys():
        if value.get("fn_name"):
            raise ValueError("tests with fn_name call a function: write them as asserts")
        if len(value["inputs"]) != len(value["outputs"]):
            raise ValueError("as many inputs as outputs are needed")
        cases = zip(value["inputs"], value["outputs"], strict=True)
        value = [{"input": entered, "output": expected} for entered, expected in cases]
    if not isinstance(value, list) or not value:
        raise ValueError(f"no tests in {value!r:.60}")
    if all(isinstance(test, str) and test.strip() for test in value):
        return {"code": value}
    if all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in value):
        cases = [[test["input"], test["output"]] for test in value]
        if all(isinstance(text, str) for case in cases for text in case):
            return {"cases": cases}
    raise ValueError("tests are Python texts, or texts of input and output")
