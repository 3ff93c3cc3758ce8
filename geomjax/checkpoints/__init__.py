"""Checkpoints: readers of every common layout, pairs of them, and the writer."""

from geomjax.checkpoints.errors import CheckpointError as CheckpointError
from geomjax.checkpoints.errors import CheckpointWriteError as CheckpointWriteError
from geomjax.checkpoints.matching import Match as Match
from geomjax.checkpoints.matching import Matching as Matching
from geomjax.checkpoints.matching import match as match
from geomjax.checkpoints.pairs import Pair as Pair
from geomjax.checkpoints.pairs import iter_pairs as iter_pairs
from geomjax.checkpoints.safetensors import SafetensorsSource as SafetensorsSource
from geomjax.checkpoints.sources import CheckpointSource as CheckpointSource
from geomjax.checkpoints.sources import DictSource as DictSource
from geomjax.checkpoints.sources import open_source as open_source
from geomjax.checkpoints.sources import open_specs as open_specs
from geomjax.checkpoints.sources import tree_source as tree_source
from geomjax.checkpoints.writer import write_safetensors as write_safetensors
