"""The methods that have a name, and what is to be known of each before choosing it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from ..errors import OptionError
from .activations.average import Average
from .activations.clustering import Agglomerative, KMeans
from .activations.optimal import Optimal
from .activations.permute import Permute
from .activations.recover import Recover
from .activations.transport import Transport
from .activations.zipit import Zip
from .energy.energy import Energy
from .method import Method
from .problem import Evidence
from .task_vectors.arithmetic import TaskArithmetic
from .task_vectors.method import TaskVectorMethod
from .task_vectors.singular import TSV, IsoC
from .task_vectors.ties import Ties
from .weights.cycle_consistent import CycleConsistent
from .weights.dual_space import MuDSC
from .weights.weight_matching import WeightMatching


@dataclass(frozen=True)
class Entry:
    """One method of fxzip.

    >>> ENTRIES["weights"].needs, ENTRIES["mudsc"].needs, ENTRIES["average"].needs
    ('weights', 'moments and weights', 'nothing')

    Attributes:
        method: its class; called, it has its default settings.
        paper: title and where it appeared; of this project where it is from no paper.
        source: arXiv number or DOI; empty without a paper.
        evidence: where its figures are, and what they say.
        extra: the optional dependency, `pip install 'fxzip[...]'`; empty for none.
        first_class: whether a user decides for it; the others are there to compare with (`fxzip.baselines`).
    """

    method: type[Method]
    paper: str
    source: str
    evidence: str
    extra: str = ""
    first_class: bool = False

    @property
    def needs(self) -> str:
        """The evidence that it matches by, in words."""
        method = self.method()
        if isinstance(method, TaskVectorMethod):
            return "the base"

        words = {"moments": "moments", "weights": "weights", "downstream": "downstream weights"}
        if method.by_position:  # what it asks for serves the report alone
            return "nothing"

        return " and ".join(word for one, word in words.items() if one in method.needs)


ENTRIES: dict[str, Entry] = {
    "energy": Entry(
        Energy,
        "of this project; its criterion is that of ThiNet (Luo et al., ICCV 2017)",
        "arXiv 1707.06342",
        "results.md, All methods: the first under least squares",
        first_class=True,
    ),
    "zip": Entry(
        Zip,
        "Stoica et al., ZipIt! Merging Models from Different Tasks without Training, ICLR 2024",
        "arXiv 2305.03053",
        "results.md, All methods: within 0.7 points of `energy` under least squares",
        first_class=True,
    ),
    "permute": Entry(
        Permute,
        "Ainsworth et al., Git Re-Basin, ICLR 2023, section 3.1",
        "arXiv 2209.04836",
        "results.md, Barriers: 99 % lower than without matching, statistics reset",
        first_class=True,
    ),
    "weights": Entry(
        WeightMatching,
        "Ainsworth et al., Git Re-Basin, ICLR 2023, section 3.2",
        "arXiv 2209.04836",
        "results.md, Barriers: the lowest between networks with LayerNorm, without data",
        first_class=True,
    ),
    "average": Entry(
        Average,
        "Wortsman et al., Model Soups, ICML 2022",
        "arXiv 2203.05482",
        "results.md, Soups: 0.8 points above the best single network",
        first_class=True,
    ),
    "task-arithmetic": Entry(
        TaskArithmetic,
        "Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023",
        "arXiv 2212.04089",
        "results.md, Fine-tunes of one base",
    ),
    "ties": Entry(
        Ties,
        "Yadav et al., TIES-Merging, NeurIPS 2023",
        "arXiv 2306.01708",
        "results.md, Fine-tunes of one base",
    ),
    "tsv": Entry(
        TSV,
        "Gargiulo et al., Task Singular Vectors, CVPR 2025",
        "arXiv 2412.00081",
        "results.md, Fine-tunes of one base",
    ),
    "iso-c": Entry(
        IsoC,
        "Marczak et al., No Task Left Behind, ICML 2025",
        "arXiv 2502.04959",
        "results.md, Fine-tunes of one base",
    ),
    "c2m3": Entry(
        CycleConsistent,
        "Crisostomi et al., C²M³: Cycle-Consistent Multi-Model Merging, NeurIPS 2024",
        "arXiv 2405.17897",
        "results.md, All methods: VGG-11, three tasks, 0.4 points above `weights` under least squares",
    ),
    "mudsc": Entry(
        MuDSC,
        "Xu et al., Training-Free Pretrained Model Merging, CVPR 2024",
        "arXiv 2403.01753",
        "results.md, All methods: VGG-11, three tasks, 0.3 points above `permute` under least squares",
    ),
    "transport": Entry(
        Transport,
        "Singh and Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020",
        "arXiv 1910.05653",
        "results.md, All methods: `permute` between equal widths; others were not measured",
        extra="ot",
    ),
    "optimal": Entry(
        Optimal,
        "Stoica et al., ZipIt!, ICLR 2024, ablation of matching algorithms",
        "arXiv 2305.03053",
        "results.md, All methods: VGG-11, two tasks, 0.5 points below `zip` under least squares and REPAIR",
    ),
    "kmeans": Entry(
        KMeans,
        "Lloyd, Least Squares Quantization in PCM, IEEE Trans. Inf. Theory 1982",
        "doi:10.1109/TIT.1982.1056489",
        "results.md, All methods: VGG-11, between `permute` and `zip` under least squares",
    ),
    "agglomerative": Entry(
        Agglomerative,
        "Sokal and Michener, average linkage, Univ. Kansas Sci. Bull. 1958",
        "",
        "results.md, All methods: within 0.3 points of `zip` under least squares",
    ),
    "recover": Entry(
        Recover,
        "of this project; after the lossy unmerge of ZipIt!, section 3",
        "arXiv 2305.03053",
        "results.md, All methods: VGG-11, over 3.5 points above `zip` under REPAIR",
    ),
}
"""By name, first class first."""


def table_of_methods() -> str:
    """All methods with what the registry says of them, as Markdown."""
    lines = ["| name | class | paper | needs | evidence | extra |", "|---" * 6 + "|"]

    for name, entry in ENTRIES.items():
        where = "fxzip" if entry.first_class else "fxzip.baselines"
        paper = ", ".join(part for part in (entry.paper, entry.source) if part)
        kind = f"`{where}.{entry.method.__name__}`"
        lines.append(f"| `{name}` | {kind} | {paper} | {entry.needs} | {entry.evidence} | {entry.extra} |")

    return "\n".join(lines)


METHODS: dict[str, Callable[[], Method]] = {name: entry.method for name, entry in ENTRIES.items()}
"""The methods that have a name, with their default settings. Your own go in as `METHODS["mine"] = Mine`."""

FIRST_CLASS = tuple(name for name, entry in ENTRIES.items() if entry.first_class)
"""Those that a user decides between; the others are there to compare with."""


LEFT = {
    "CCA": "CCA Merge has left fxzip: of all methods it alone was below averaging under least squares on every set of "
    'networks that was measured. Use `method="permute"`.'
}
"""Methods that are no longer here, by class, and why."""


def resolve(method: str | Method) -> Method:
    """The method of that name, or the method itself.

    >>> resolve("zip")
    Zip(alpha=1.0, beta=1.0)
    >>> resolve(Zip(alpha=0.1, beta=0.5))
    Zip(alpha=0.1, beta=0.5)

    Raises:
        OptionError: the name is unknown, or `method` is neither a name nor a method.
    """
    if isinstance(method, str):
        if method.upper() in LEFT:
            raise OptionError(LEFT[method.upper()])

        if method not in METHODS:
            near = difflib.get_close_matches(method, METHODS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"`method` must be one of {', '.join(map(repr, METHODS))}; got {method!r}.{hint}")

        method = METHODS[method]()

    if isinstance(method, Method):
        if unknown := method.needs - set(get_args(Evidence)):
            raise OptionError(
                f"`needs` of a method names evidence, {', '.join(map(repr, get_args(Evidence)))}; found "
                f"{', '.join(map(repr, sorted(unknown)))} in `{method!r}`."
            )
        return method

    # A class in the place of an object is a slip; an object with a call or `match` of its own lacks the base class.
    if not isinstance(method, type) and (callable(method) or hasattr(method, "match")):
        base = "Method" if hasattr(method, "match") else "SpaceMethod"
        kind = type(method).__name__
        raise OptionError(
            f"A method must be a subclass of `fxzip.matching.{base}`, which gives it what it does not define "
            f"itself; found `{kind}`, which is none. Write `class {kind}(fxzip.matching.{base})`."
        )
    raise OptionError(
        f"`method` must be a name or a method with its settings, such as `Zip(alpha=0.1)`; got `{method!r}`."
    )
