from .baselines import BASELINES as BASELINES
from .statistics import METRICS as METRICS
from .statistics import Comparison as Comparison
from .statistics import bootstrap_interval as bootstrap_interval
from .statistics import comparison_markdown as comparison_markdown
from .statistics import comparison_table as comparison_table
from .statistics import rank_metrics as rank_metrics
from .statistics import relative_change as relative_change
