"""What one round's conversation tells of a device's pace."""

from __future__ import annotations

from spinecli.split.channel import Talk
from spinecli.split.control.estimates import Iteration, Pace, Transfer, observed_pace


def pace_of(talk: Talk, steps: int) -> Pace | None:
    """The pace of a device in a round of `steps` iterations; None if it was lost before it could tell.

    An exchange in the middle of a round is backward through one batch and forward through the next, which is what an
    iteration computes; the features of exchange k belong to the gradients of exchange k + 1. A round of one iteration
    has no middle, and its two exchanges together are the iteration.
    """
    timings = talk.timings
    uploads = [Transfer(timing.bytes_up, timing.upload_seconds) for timing in timings]
    downloads = [Transfer(timing.bytes_down, timing.download_seconds) for timing in timings]
    if steps == 1:
        if len(timings) < 2 or not talk.trained[1]:
            return None
        compute = timings[0].compute_seconds + timings[1].compute_seconds
        whole = [Iteration(talk.rows, compute, uploads[0], downloads[1])]
        return observed_pace(whole, uploads[1:], downloads[:1])
    middle = [k for k in range(1, min(steps, len(timings))) if talk.trained[k]]
    iterations = [Iteration(talk.rows, timings[k].compute_seconds, uploads[k], downloads[k]) for k in middle]
    return observed_pace(iterations, [*uploads[:1], *uploads[steps:]], [*downloads[:1], *downloads[steps:]])
