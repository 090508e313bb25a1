"""Mutation tests: change the source in small ways and count the changes that no test notices.

    make mutants                                              # 300 random mutants
    python -m tools.mutants --only megatron_llmjp/config --number 50 --seed 7
    python -m tools.mutants --run 1a2b3c4d                    # one of them, with pytest's output
    python -m tools.mutants --record tests/data/test_folds.py # after a change of these tests

The first run records which tests execute which lines, with a run of all tests under coverage; it is
repeated by ``--record``. Each mutant is then tested by the tests that execute its line, quickest
first, at most 60 seconds by their recorded durations. It is killed when one fails. It also counts
as killed, by the time limit, when its tests take three times as long as recorded, and a minute
(more on a busy machine). At the end, or after Ctrl-C, the tests that killed mutants are run without
a mutant; those that fail are not counted.

Maintained tools do not fit. mutmut 3 changes functions only, and none that is decorated or in a
decorated class: no field, constant or method of a dataclass, which are half of what went unnoticed
here; it calls functions through wrappers with other signatures, which pydantic and ``inspect``
see. cosmic-ray runs one command for each mutant: a new pytest, with four seconds of imports, and
the same tests for all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace

from tqdm import tqdm

from tools.mutants.operators import Mutant, mutants_of
from tools.mutants.recording import DATA, FOLDER, ROOT, Recording, changed_sources, record
from tools.mutants.runner import ERROR, KILLED, SURVIVED, TIMEOUT, Outcome, Runner, warm_up

TARGETS = ("data", "training", "checkpoint", "convert", "estimate", "planning.py", "config")
BUDGET_SECONDS = 60.0
PARALLEL = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns 0, also when mutants survive."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the random choice (default: 0)")
    add("--number", type=int, default=300, help="of mutants to test (default: 300)")
    add("--only", nargs="+", metavar="PATH", help="files or folders (default: the packages)")
    add("--list", action="store_true", help="print the chosen mutants and exit")
    add("--run", metavar="ID", help="test one mutant and show the output of pytest")
    add("--record", nargs="*", metavar="TEST", help="record the tests, or these files, again")
    arguments = parser.parse_args(argv)
    if arguments.record is not None or not DATA.exists():
        record(arguments.record or [])
        if arguments.record is not None:
            return 0
    if changed := changed_sources():
        print(f"{len(changed)} files changed since the recording, such as {changed[0]}: --record")
        return 2
    mutants = _all_mutants(arguments.only)
    recording = Recording()
    if arguments.run:
        return _show([m for m in mutants if m.id == arguments.run], recording)
    chosen, untested = _draw(mutants, recording, arguments.seed, arguments.number)
    print(f"seed {arguments.seed}: {len(chosen)} of {len(mutants)} mutants")
    print(f"{len(untested)} other mutants were drawn, on lines that no test executes")
    if arguments.list:
        print("\n".join(_line(mutant) for mutant in chosen))
        return 0
    _report(_test(chosen, recording), untested, arguments.seed)
    return 0


def _all_mutants(only: Sequence[str] | None) -> list[Mutant]:
    roots = [ROOT / path for path in only or (f"megatron_llmjp/{name}" for name in TARGETS)]
    files = [file for root in roots for file in (sorted(root.rglob("*.py")) or [root])]
    return [
        mutant
        for file in files
        for mutant in mutants_of(file.relative_to(ROOT).as_posix(), file.read_bytes())
    ]


def _draw(
    mutants: list[Mutant], recording: Recording, seed: int, number: int
) -> tuple[list[Mutant], list[Mutant]]:
    """Draw mutants at random until ``number`` of them have tests; return also the others."""
    order = random.Random(seed).sample(mutants, len(mutants))
    chosen: list[Mutant] = []
    untested: list[Mutant] = []
    for mutant in order:
        if len(chosen) == number:
            break
        (chosen if recording.tests_of(mutant) else untested).append(mutant)
    return chosen, untested


def _limit(recording: Recording, tests: Sequence[str]) -> float:
    """Return the seconds that tests may take in all, more on a busy machine."""
    busy = min(5.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))
    return busy * (60 + 3 * sum(recording.seconds[test] for test in tests))


def _show(found: list[Mutant], recording: Recording) -> int:
    tests = recording.choose(found[0], BUDGET_SECONDS) if found else []
    if not tests:
        print("no test executes this line" if found else "no mutant has this ID")
        return 2
    warm_up()
    outcomes: list[Outcome] = []
    runner = Runner(1, lambda _, outcome: outcomes.append(outcome), show=True)
    runner.start(None, found[0], tests, _limit(recording, tests))
    runner.finish()
    print(f"{_line(found[0])}: {outcomes[0].state} {outcomes[0].by}")
    return 0


def _test(mutants: list[Mutant], recording: Recording) -> dict[Mutant, Outcome]:
    """Test all mutants, and again those that were killed by tests that fail without a mutant."""
    warm_up()
    results: dict[Mutant, Outcome] = {}
    unreliable: set[str] = set()
    verified: set[str] = set()
    rest = mutants
    while rest:
        results |= _test_once(rest, recording, unreliable)
        killers = {r.by for r in results.values() if r.state == KILLED} - verified
        unreliable |= _failing_without_mutant(killers, recording)
        verified |= killers - unreliable
        rest = [m for m, r in results.items() if r.state == KILLED and r.by in unreliable]
    if unreliable:
        print(f"not counted, since they fail without a mutant: {', '.join(sorted(unreliable))}")
    return results


def _test_once(
    mutants: list[Mutant], recording: Recording, without: set[str]
) -> dict[Mutant, Outcome]:
    results: dict[Mutant, Outcome] = {}
    tqdm.monitor_interval = 0  # no thread: this process forks
    with tqdm(total=len(mutants), unit="mutant", smoothing=0) as bar:

        def done(mutant: Mutant, outcome: Outcome) -> None:
            results[mutant] = outcome
            if outcome.state in (SURVIVED, ERROR):
                bar.write(f"{outcome.state}: {_line(mutant)}")
            bar.update()

        runner = Runner(PARALLEL, done)
        try:
            for mutant in mutants:
                chosen = recording.choose(mutant, BUDGET_SECONDS)
                tests = [t for t in chosen if not {t, t.split("::")[0]} & without]
                if tests:
                    runner.start(mutant, mutant, tests, _limit(recording, tests))
                else:
                    done(mutant, Outcome(ERROR))
            runner.finish()
        except KeyboardInterrupt:
            print("interrupted: results so far")
        finally:
            runner.kill()
    return results


def _failing_without_mutant(tests: set[str], recording: Recording) -> set[str]:
    """Return the tests, or whole files, that fail in this way of running them."""
    by_file: defaultdict[str, set[str]] = defaultdict(set)
    for test in tests:
        file = test.split("::")[0]
        by_file[file] |= {test} if test in recording.seconds else set(recording.of_file(file)[:1])
    failing: set[str] = set()
    while by_file:
        results: dict[str, Outcome] = {}
        runner = Runner(PARALLEL, results.__setitem__)
        for file, rest in by_file.items():
            runner.start(file, None, sorted(rest), _limit(recording, sorted(rest)))
        runner.finish()
        bad = {file: r.by or file for file, r in results.items() if r.state != SURVIVED}
        failing |= set(bad.values())
        by_file = defaultdict(
            set, {f: by_file[f] - {by} for f, by in bad.items() if by_file[f] - {by} and by != f}
        )
    return failing


def _report(results: dict[Mutant, Outcome], untested: Sequence[Mutant], seed: int) -> None:
    counts = {
        state: sum(r.state == state for r in results.values())
        for state in (KILLED, TIMEOUT, SURVIVED, ERROR)
    }
    for mutant, result in results.items():
        if result.state in (SURVIVED, ERROR):
            print(f"{_line(mutant)}\n        {result.state}; {result.ran} tests")
    killed = counts[KILLED] + counts[TIMEOUT]
    print(f"{killed} of {len(results)} killed = {killed / max(1, len(results)):.1%}: {counts}")
    print(f"with the {len(untested)} untested: {killed / (len(results) + len(untested) or 1):.1%}")
    content = {
        "seed": seed,
        "counts": counts,
        "mutants": [
            {**asdict(m), "id": m.id, **asdict(replace(r, tests=r.tests[:20]))}
            for m, r in results.items()
        ],
        "untested": [{**asdict(m), "id": m.id} for m in untested],
    }
    (FOLDER / "results.json").write_text(json.dumps(content, indent=1))
    print(f"wrote {(FOLDER / 'results.json').relative_to(ROOT)}")


def _line(mutant: Mutant) -> str:
    before, after = (" ".join(text.split()) for text in (mutant.before, mutant.after))
    return f"{mutant.id} {mutant.path}:{mutant.line}: {before[:90]} -> {after[:90]}"


if __name__ == "__main__":
    sys.exit(main())
