"""Retry policies: whether an attempt is followed by another one, and when. Pure.

    how the attempt ended                      never   on_lost           on_failure
    declined by its worker                     (another attempt that does not count; see launches.py)
    lost before its start was confirmed        ends    at once           at once
    lost after its start was confirmed         ends    after a pause     after a pause
    FAILED, TIMED_OUT                          ends    ends              after a pause
    SUCCEEDED, CANCELLED                       ends    ends              ends

A launch that was told to stop makes no further attempt, and none makes more than `attempts_max`.

The pause after the n-th attempt that counts is `retry_backoff_s * 2**(n-1)`, at most `retry_backoff_s_max`, times 0.9
to 1.1 by a hash of the token: jobs that failed together do not come back together, and every leader computes the same.
"""

from __future__ import annotations

from coordinator.model import HASH_SPACE, CronJob, CronJobSpec, Launch, LaunchState, RetryPolicy, WallMs, key_hash

SPREAD = 0.1
"""A pause is so much longer or shorter at most, as a part of it."""
_FAILURES = (LaunchState.FAILED, LaunchState.TIMED_OUT)


def may_follow_loss(spec: CronJobSpec, launch: Launch) -> bool:
    """True when the policy wants another attempt after this one is lost."""
    return spec.retry is not RetryPolicy.NEVER and _has_another(spec, launch)


def may_follow_end(spec: CronJobSpec, launch: Launch, state: LaunchState) -> bool:
    """True when the policy wants another attempt after this one has ended in `state`."""
    return spec.retry is RetryPolicy.ON_FAILURE and state in _FAILURES and _has_another(spec, launch)


def is_last(spec: CronJobSpec, launch: Launch) -> bool:
    """True when only `attempts_max` keeps it from another attempt."""
    return spec.retry is not RetryPolicy.NEVER and launch.attempts_counted >= spec.attempts_max


def pause_ms(spec: CronJobSpec, launch: Launch) -> int:
    """The pause after the launch's present attempt, at least 1."""
    pause_s = min(spec.retry_backoff_s * 2.0 ** (max(launch.attempts_counted, 1) - 1), spec.retry_backoff_s_max)
    token = f"{launch.job_id}/{launch.scheduled_at_ms}/{launch.attempt}"
    share = key_hash(token) / HASH_SPACE
    return max(1, round(pause_s * 1_000 * (1 - SPREAD + 2 * SPREAD * share)))


def retry_at_ms(spec: CronJobSpec, launch: Launch, wall: WallMs) -> WallMs:
    """When the next attempt may begin, were the present one to end now."""
    return WallMs(wall + pause_ms(spec, launch))


def wait_left_ms(job: CronJob | None, launch: Launch, wall: WallMs) -> int:
    """How long a launch waits yet; a retry a whole pause at most, wherever the wall clock was when it began."""
    left_ms = max(0, launch.not_before_ms - wall)
    return min(left_ms, pause_ms(job.spec, launch)) if job is not None and launch.attempt else left_ms


def _has_another(spec: CronJobSpec, launch: Launch) -> bool:
    return launch.attempts_counted < spec.attempts_max and not launch.cancel_reason
