"""What residual sums are for in 32 and 50 layers: `tiny`, deeper."""

from pathlib import Path

from jaxformer.config import execute
from jaxformer.lab.experiments import Experiment, Report

DEPTHS = 32, 50
TINY = execute(Path(__file__).parent / "tiny.py")
ROWS = tuple(TINY["deep"](depth, residual) for depth in DEPTHS for residual in (TINY["BOTH"], TINY["NEITHER"]))


def tell(report: Report) -> None:
    TINY["why"](report, DEPTHS)
    found = [report.results[row.name].mean for row in ROWS]
    pairs = list(zip(DEPTHS, found[::2], found[1::2], strict=True))
    if all(both > neither - 0.1 for _, both, neither in pairs):
        losses = ", ".join(f"in {depth} layers {both:.2f} and {neither:.2f}" for depth, both, neither in pairs)
        report.text(
            f"So deep sums are not enough: the losses with and without them are {losses}, though before training "
            "gradients reach the first layer. With norms behind the sums a rate that is "
            "constant from the first step on is too high for so many layers (arXiv:2002.04745); tokens become alike "
            "here, too."
        )


experiment = Experiment(
    "Residual sums in 32 and 50 layers",
    """
The models of "One layer, norms behind the sums", deeper: with and without residual sums, 1,000 steps each, the training
loss of the last tenth of them, of which every tenth is logged.
""",
    ROWS,
    tell,
    long=True,
)
