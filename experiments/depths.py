"""What residual sums are for in 32 layers: `tiny`, deeper."""

from pathlib import Path

from jaxformer.config import execute
from jaxformer.lab.experiments import Experiment, Report

DEPTHS = (32,)
TINY = execute(Path(__file__).parent / "tiny.py")
ROWS = tuple(TINY["deep"](depth, residual) for depth in DEPTHS for residual in (TINY["BOTH"], TINY["NEITHER"]))


def tell(report: Report) -> None:
    TINY["why"](report, DEPTHS)


experiment = Experiment(
    "Residual sums in 32 layers",
    """
The models of "One layer, norms behind the sums", deeper: with and without residual sums, 1,000 steps each, the training
loss of the last tenth of them, of which every tenth is logged.
""",
    ROWS,
    tell,
    long=True,
)
