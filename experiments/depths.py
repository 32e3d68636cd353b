"""What residual sums are for in 32 and 50 layers: `tiny`, deeper."""

from tiny import BOTH, NEITHER, deep, why

from jaxformer.lab.experiments import Experiment, Report

DEPTHS = 32, 50


def tell(report: Report) -> None:
    why(report, DEPTHS)


experiment = Experiment(
    "Residual sums in 32 and 50 layers",
    """
The models of "One layer, norms behind the sums", deeper: with and without residual sums, 2,000 steps each, the training
loss of the last tenth of them.
""",
    tuple(deep(depth, residual) for depth in DEPTHS for residual in (BOTH, NEITHER)),
    tell,
    long=True,
)
