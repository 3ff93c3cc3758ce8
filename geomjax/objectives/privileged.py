"""Rows in which a teacher reads more than the student: self-distillation's two views.

In on-policy self-distillation (OPSD; P1's pair of that name) the teacher is the model
itself before training, reading the student's completion after a prompt with privileged
information, such as the answer. A row holds both views side by side, the teacher's
first, each ending with the completion:

    [ x', y | x, y ]

so that a row stays a row wherever batches are split. Each model reads its own part
alone.
"""

from geomjax.objectives.base import Batch


def split_views(batch: Batch, privileged: int) -> tuple[Batch, Batch]:
    """The student's view of the rows, and the teacher's.

    Args:
      batch: Rows of `geomjax.train.privileged.join_views`, or plain ones.
      privileged: Slots of the teacher's view; 0 for plain rows, which are both.
    """
    if not privileged:
        return batch, batch
    student, teacher = (
        batch._replace(
            tokens=batch.tokens[:, part],
            positions=batch.positions[:, part],
            segment_ids=batch.segment_ids[:, part],
        )
        for part in (slice(privileged, None), slice(privileged))
    )
    return student, teacher
