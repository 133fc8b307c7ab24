"""Zip random networks, and make smaller what fails.

PYTHONPATH=tests python -m fuzz --first 0 --count 500          # these seeds
PYTHONPATH=tests python -m fuzz --count 500                    # fresh ones, from the clock
PYTHONPATH=tests python -m fuzz --program "Program(...)" --seed 7
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import torch

from .minimise import minimise, signature
from .oracles import Fault, FaultyAccount, Found, run
from .program import Program, build, inputs, random_program


def main() -> int:
    """Run the oracles; the exit status is 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--first", type=int, default=None, help="the first seed; from the clock by default")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--each", type=int, default=1, help="so many reproductions of each kind; 0: do not minimise")
    parser.add_argument("--program", help="one program, as it was printed")
    parser.add_argument("--seed", type=int, default=0, help="the seed of its weights and settings")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.program:
        program = eval(asked.program, {"Program": Program})  # the user's own command line
        found = run(program, asked.seed)
        print(*found.faults, sep="\n")
        print("refused:", dict(found.refused))
        return bool(found.faults)
    first = int(time.time()) % 10**7 * 100 if asked.first is None else asked.first
    return _sweep(range(first, first + asked.count), asked.seconds, asked.each)


def _sweep(seeds: range, seconds: float, each: int) -> int:
    end = time.monotonic() + seconds
    kinds: Counter[str] = Counter()
    total, failed, done = Found(), 0, 0
    for seed in seeds:
        if time.monotonic() > end:
            break
        program = random_program(seed)
        try:
            found = run(program, seed)
        except FaultyAccount as error:
            found = Found([Fault("the generator", str(error), "")])
        done, failed = done + 1, failed + bool(found.faults)
        if done % 25 == 0:
            print(f"{done} networks, {failed} with a fault", flush=True)
        total.refused += found.refused
        total.held += found.held
        for fault in found.faults:
            small, same = minimise(program, seed, fault, seconds=30) if each else (program, fault)
            kind = (
                f"{fault.oracle}: {fault.kind} [{signature(small, seed)}]" if each else f"{fault.oracle}: {fault.kind}"
            )
            kinds[kind] += 1
            if kinds[kind] <= each:
                show(small, seed, same)
    print(f"\n{done} networks, {failed} with a fault; seeds {seeds.start} to {seeds.start + done - 1}")
    print(*(f"{count:6}  {kind}" for kind, count in kinds.most_common()), sep="\n")
    print("held:", dict(total.held))
    print("refused:", *(f"{count:6}  {text}" for text, count in total.refused.most_common(20)), sep="\n")
    return bool(failed)


def show(program: Program, seed: int, fault: Fault) -> None:
    """Print a reproduction that stands by itself."""
    print(f"\n=== {fault}\n{signature(program, seed)}")
    print(f'PYTHONPATH=tests python -m fuzz --seed {seed} --program "{program}"')
    try:
        print(torch.fx.symbolic_trace(build(program, seed)).code.strip())
    except Exception as error:  # a reproduction is shown as far as can be
        print(f"(torch.fx does not trace it: {type(error).__name__})", build(program, seed))
    print("input", tuple(inputs(program, 4, 0).shape), flush=True)


if __name__ == "__main__":
    sys.exit(main())
