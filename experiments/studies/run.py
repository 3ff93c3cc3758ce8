"""A training run of a study, as plain values."""

from typing import NamedTuple

from geomjax.optim.bfloat16 import ROUNDINGS
from geomjax.train.learn import Controls

KINDS = ("distill", "foreign", "reward", "responses", "teacher_samples")
"""Where sequences come from, and what is learnt from them:

- `distill`: the student's; the teacher's judgement of each token, mixed with a reward;
- `foreign`: the teacher's; the same, importance-clipped;
- `reward`: the student's; the reward alone (GRPO);
- `responses`: the data set's; cross-entropy (SFT);
- `teacher_samples`: the teacher's; cross-entropy (offline distillation).

Beside them are the losses of `experiments.studies.forms`, on the student's sequences.
"""

IMITATED = ("responses", "teacher_samples")
"""The kinds that learn by cross-entropy, and share a program."""


FLOAT32 = "float32"
STORED = (FLOAT32, *ROUNDINGS)
"""How parameters are kept between updates: as float32 masters, or in bfloat16, rounded
to nearest or stochastically, see `geomjax.optim.stored_bfloat16`."""


class Run(NamedTuple):
    """One run.

    Attributes:
      arm: Its name in results and folders.
      kind: One of `KINDS`, or a loss of `experiments.studies.forms`.
      learning_rate: Its rate, constant.
      seed: Of prompts and draws.
      first_step: Steps of the schedule that lie behind its start.
      controls: What a policy gradient learns from.
      stored: One of `STORED`.
    """

    arm: str
    kind: str
    learning_rate: float
    seed: int
    first_step: int = 0
    controls: Controls = Controls()
    stored: str = FLOAT32

    @property
    def folder(self) -> str:
        """Its folder within the study's."""
        return f"arms/{self.arm}/seed_{self.seed}"
