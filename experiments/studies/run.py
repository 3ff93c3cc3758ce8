"""A training run of a study, as plain values."""

from typing import NamedTuple

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


class Run(NamedTuple):
    """One run.

    Attributes:
      arm: Its name in results and folders.
      kind: One of `KINDS`, or a loss of `experiments.studies.forms`.
      learning_rate: Its rate, constant.
      seed: Of prompts and draws.
      first_step: Steps of the schedule that lie behind its start.
      controls: What a policy gradient learns from.
    """

    arm: str
    kind: str
    learning_rate: float
    seed: int
    first_step: int = 0
    controls: Controls = Controls()

    @property
    def folder(self) -> str:
        """Its folder within the study's."""
        return f"arms/{self.arm}/seed_{self.seed}"
