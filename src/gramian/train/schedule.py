"""Learning-rate schedules as pure functions of the step."""

import math

from gramian.errors import InputError

SCHEDULES = ("linear", "cosine", "constant", "step")


def multiplier(step: int, steps: int, warmup: float, schedule: str) -> float:
    """Return the factor on the peak learning rate at a step (0 ≤ step < steps).

        warm-up of w = ⌈warmup · steps⌉ steps:  m(t) = (t + 1)/w,   t < w
        linear                                  m(t) = (S − t)/(S − w)
        cosine                                  m(t) = (1 + cos(π (t − w)/(S − w)))/2
        constant                                m(t) = 1
        step                                    m(t) = 1, 1/10, 1/100 from t = 0, S/2, 3S/4

    Raises: InputError for an unknown schedule, a warm-up outside [0, 1], or a step outside the run.
    Holds: exactly; 0 < m ≤ 1, and m = 1 first at the end of the warm-up.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup <= 1:
        raise InputError(f"the warm-up is a fraction of the steps in [0, 1], got {warmup:g}")
    if not 0 <= step < steps:
        raise InputError(f"step {step} lies outside a run of {steps} steps")
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return 1.0 if 2 * step < steps else 0.1 if 4 * step < 3 * steps else 0.01
    progress = (step - rising) / (steps - rising)
    return 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
