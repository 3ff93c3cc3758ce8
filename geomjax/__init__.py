"""What did training do to the weights?

geomjax measures the update between two checkpoints of a language model and reruns the
training that produces such updates. Two wings meet at the Hugging Face checkpoint
directory: `analysis` reads pairs of them and knows no model code; `train` writes them
and knows no metrics.
"""

__version__ = "0.1.0"
