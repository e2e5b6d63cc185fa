"""Where the loop stops between steps: evaluations, checkpoints, ends of epochs."""


class Boundaries:
    """Steps of one participant's run at which something besides training happens.

    Args:
        num_steps: optimizer steps of the run.
        num_steps_per_epoch: of one pass over the data.
        eval_every, checkpoint_every: ``epoch``, ``never`` or a number of steps as text.
    """

    def __init__(
        self, num_steps: int, num_steps_per_epoch: int, *, eval_every: str, checkpoint_every: str
    ) -> None:
        self._num_steps = num_steps
        self._eval_period = _period(eval_every, num_steps_per_epoch)
        self._checkpoint_period = _period(checkpoint_every, num_steps_per_epoch)

    def next_after(self, step: int) -> int:
        """The first boundary behind ``step``, at most the last step."""
        following = [self._num_steps]
        for period in (self._eval_period, self._checkpoint_period):
            if period is not None:
                following.append((step // period + 1) * period)
        return min(following)

    def evaluate_at(self, step: int) -> bool:
        """Whether an evaluation is due after ``step``; the one after the last step is not among these."""
        return step < self._num_steps and self._eval_period is not None and step % self._eval_period == 0

    def checkpoint_at(self, step: int) -> bool:
        """Whether a checkpoint is due after ``step``; the one after the last step is not among these."""
        return (
            step < self._num_steps
            and self._checkpoint_period is not None
            and step % self._checkpoint_period == 0
        )


def _period(every: str, num_steps_per_epoch: int) -> int | None:
    if every == "never":
        return None
    return num_steps_per_epoch if every == "epoch" else int(every)
