"""`wam conformance`: the released systems' own numbers, computed again by this network.

    CASE.json  ->  converter (the released key map)  ->  WorldActionModel  ->  the paths a user takes  ->  errors, output by output

All cases are read and checked before the first is computed.  What a stage cannot compute fails its outputs with the reason; nothing
that a case stores is passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from wam.evaluation.conformance import dreamzero, fast_wam, lingbot
from wam.evaluation.conformance.case import Case, load_case
from wam.evaluation.conformance.compare import RELATIVE_L2, Line, Result, compare, render, summary
from wam.evaluation.conformance.stages import Plan
from wam.files import write_json_atomic

SYSTEMS = (dreamzero, fast_wam, lingbot)
FAILURES = (ValueError, RuntimeError, KeyError, NotImplementedError)


class ConformanceError(RuntimeError):
    """Some output of some case is not within tolerance."""


def conformance(paths: Sequence[Path], tolerance: float = RELATIVE_L2, json_path: Path | None = None) -> list[Result]:
    """Compute cases and print what they come to.

    Args:
        tolerance: largest relative L2 error; the largest absolute error may be ten times that.

    Raises:
        FileNotFoundError, ValueError: a case that is missing, damaged or of no known system; before anything is computed.
        ConformanceError: an output is not within tolerance, after everything was printed and written.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"--tolerance is {tolerance}; expected a relative error between 0 and 1, e.g. {RELATIVE_L2}")
    cases = [load_case(path) for path in paths]
    plans = [_prepare(case) for case in cases]
    results = []
    with tqdm(total=sum(len(case.outputs) for case in cases), unit="output", desc="conformance") as progress:
        for case, plan in zip(cases, plans, strict=True):
            results.append(_compute(case, plan, tolerance, progress))
            tqdm.write(render(results[-1]) + "\n")
    if json_path is not None:
        passed = all(result.passed for result in results)
        write_json_atomic(json_path, {"tolerance": tolerance, "passed": passed, "cases": [result.to_dict() for result in results]})
    if not all(result.passed for result in results):
        raise ConformanceError(f"{summary(results)}; the rows marked FAIL say which are not")
    print(summary(results))
    return results


def _prepare(case: Case) -> Plan:
    """Weights through the converter, and the stages of its outputs.

    Raises:
        ValueError: a system that this version does not know.
    """
    for system in SYSTEMS:
        if system.recognises(case.spec):
            return system.prepare(case)
    names = ", ".join(system.NAME for system in SYSTEMS)
    raise ValueError(f"{case.path}: the config is of no known system (it has {', '.join(sorted(case.spec['config']))}); known: {names}")


def _compute(case: Case, plan: Plan, tolerance: float, progress: tqdm[None]) -> Result:
    """Every output of one case, in the case's order."""
    lines: dict[str, Line] = {}
    for stage in plan.stages:
        progress.set_postfix_str(f"{case.name} {stage.outputs[0].rpartition('/')[0]}")
        ours: dict[str, Tensor] = {}
        reason = "its stage does not compute this output; the runner knows no such name"
        try:
            ours = stage.run()
        except FAILURES as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        for name in stage.outputs:
            lines[name] = compare(name, case.outputs[name], ours[name], tolerance) if name in ours else Line(name, None, None, False, reason)
        progress.update(len(stage.outputs))
    for name in case.outputs:
        if name not in lines:
            lines[name] = Line(name, None, None, False, "no stage computes this output; the runner knows no such name")
            progress.update(1)
    return Result(case.name, str(case.path), plan.system, [lines[name] for name in case.spec["outputs"]], list(plan.unused))
