"""`wam conformance`: the released systems' own numbers, computed again by this network.

    CASE.json  ->  converter (the released key map)  ->  WorldActionModel  ->  the paths a user takes  ->  errors, output by output

Each case stands alone: one that is damaged, or of sizes that this network does not have, fails with the reason, and so do outputs whose
stage cannot run; the rest is computed.  Nothing that a case stores is passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from wam.evaluation.conformance import checkpoint, dreamzero, fast_wam, lingbot, schedules
from wam.evaluation.conformance.case import Case, load_case, read_json
from wam.evaluation.conformance.compare import RELATIVE_L2, Line, Result, compare, render, summary
from wam.evaluation.conformance.stages import Plan
from wam.files import write_json_atomic

SYSTEMS = (dreamzero, fast_wam, lingbot)  # a JSON and the tensors beside it
LISTS = (schedules, checkpoint)  # a JSON alone
FAILURES = (ValueError, RuntimeError, LookupError, TypeError, ArithmeticError, AssertionError, OSError)  # of a case that is not what we know


class ConformanceError(RuntimeError):
    """Some output of some case is not within tolerance."""


def conformance(paths: Sequence[Path], tolerance: float = RELATIVE_L2, json_path: Path | None = None) -> list[Result]:
    """Compute cases and print what they come to.

    Args:
        tolerance: largest relative L2 error; the largest absolute error may be ten times that.

    Raises:
        ValueError: a tolerance that is none.
        ConformanceError: an output is not within tolerance, or a file is no case that can be computed; after everything was printed and written.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"--tolerance is {tolerance}; expected a relative error between 0 and 1, e.g. {RELATIVE_L2}")
    results = []
    with tqdm(paths, unit="case", desc="conformance") as progress:
        for path in progress:
            results.append(_result(path, tolerance, progress))
            tqdm.write(render(results[-1]) + "\n")
    passed = all(result.passed for result in results)
    if json_path is not None:
        write_json_atomic(json_path, {"tolerance": tolerance, "passed": passed, "cases": [result.to_dict() for result in results]})
    if not passed:
        raise ConformanceError(f"{summary(results)}; the rows marked FAIL say which are not")
    print(summary(results))
    return results


def _result(path: Path, tolerance: float, progress: tqdm[Path]) -> Result:
    """One case, whatever becomes of it."""
    try:
        case, plan = prepare(path)
    except FAILURES as error:
        return Result(path.stem, str(path), "unknown", refused=_reason(error))
    return _compute(case, plan, tolerance, progress)


def prepare(path: Path) -> tuple[Case, Plan]:
    """A case, read and checked, with its weights in our network and the stages of its outputs.

    Raises:
        FileNotFoundError, ValueError: missing, damaged, of no known system, or of sizes that this network does not have.
    """
    spec = read_json(path)
    for kind in LISTS:
        if kind.recognises(spec):
            case = kind.load(path, spec)
            return case, kind.prepare(case)
    case = load_case(path)
    for system in SYSTEMS:
        if system.recognises(case.spec):
            return case, system.prepare(case)
    names = ", ".join(system.NAME for system in SYSTEMS)
    raise ValueError(f"{path}: the config is of no known system (it has {', '.join(sorted(case.spec['config']))}); known: {names}")


def _compute(case: Case, plan: Plan, tolerance: float, progress: tqdm[Path]) -> Result:
    """Every output of one case, in the case's order."""
    lines: dict[str, Line] = {}
    for stage in plan.stages:
        progress.set_postfix_str(f"{case.name} {stage.outputs[0].rpartition('/')[0]}")
        ours: dict[str, Tensor] = {}
        reason = "its stage does not compute this output; the runner knows no such name"
        try:
            ours = stage.run()
        except FAILURES as error:
            reason = _reason(error)
        for name in stage.outputs:
            lines[name] = compare(name, case.outputs[name], ours[name], tolerance) if name in ours else Line(name, None, None, False, reason)
    for name in case.outputs:
        if name not in lines:
            lines[name] = Line(name, None, None, False, "no stage computes this output; the runner knows no such name")
    return Result(case.name, str(case.path), plan.system, [lines[name] for name in case.spec["outputs"]], list(plan.unused))


def _reason(error: Exception) -> str:
    """What a person needs: errors of ours are sentences, others are told with their kind."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, FileNotFoundError)) and text else f"{type(error).__name__}: {text}"
