"""A program that fails made smaller, as long as it fails in the same way."""

from __future__ import annotations

import time

from .building import Block, Chain
from .oracles import BY_NAME, Fault, FaultyAccount, run
from .program import Program, build


def fails_alike(program: Program, seed: int, fault: Fault) -> Fault | None:
    """The fault of that oracle and kind that the program has, too."""
    try:
        found = run(program, seed, (BY_NAME[fault.oracle],))
    except FaultyAccount:
        return None
    return next((own for own in found.faults if (own.oracle, own.kind) == (fault.oracle, fault.kind)), None)


def minimise(program: Program, seed: int, fault: Fault, *, seconds: float = 60) -> tuple[Program, Fault]:
    """Drop steps, halves first, while the fault stays."""
    end, current = time.monotonic() + seconds, fault
    while True:
        for smaller in program.smaller:
            if time.monotonic() > end:
                return program, current
            same = fails_alike(smaller, seed, fault)
            if same is not None:
                program, current = smaller, same
                break
        else:
            return program, current


def signature(program: Program, seed: int) -> str:
    """What a program is made of, in a few words: by this, faults of one kind are told from others."""
    network = build(program, seed)
    head = network.head
    end = [head.after, head.special, head.container, "one" if head.one else ""]
    if head.container not in ("tensor", "single"):
        end.append(f"second {head.second}")
    return f"{program.kind}: " + " | ".join([*map(_words, network.blocks), ", ".join(word for word in end if word)])


def _words(block: Block) -> str:
    own = [
        str(getattr(block, name))
        for name in ("how", "form", "kind", "mode")
        if isinstance(getattr(block, name, None), str)
    ]
    inner = [_words(step) for child in block.children() if isinstance(child, Chain) for step in child.blocks]
    return type(block).__name__ + (f"({', '.join(own)})" if own else "") + (f"[{'; '.join(inner)}]" if inner else "")
