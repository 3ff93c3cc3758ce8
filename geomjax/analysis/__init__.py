"""What training did to the weights: tables, aggregates, nulls and comparisons."""

from geomjax.analysis.aggregate import Summary as Summary
from geomjax.analysis.aggregate import summarize as summarize
from geomjax.analysis.estimate import Estimate as Estimate
from geomjax.analysis.estimate import estimate as estimate
from geomjax.analysis.in_memory import measure as measure
from geomjax.analysis.measure import Row as Row
from geomjax.analysis.metric import Column as Column
from geomjax.analysis.metric import Metric as Metric
from geomjax.analysis.metric import Pool as Pool
from geomjax.analysis.metrics import DEFAULT as DEFAULT
from geomjax.analysis.metrics import default_metrics as default_metrics
from geomjax.analysis.needs import Needs as Needs
from geomjax.analysis.operands import Operands as Operands
from geomjax.analysis.reductions import Reductions as Reductions
from geomjax.analysis.run import RunResult as RunResult
from geomjax.analysis.run import run as run
