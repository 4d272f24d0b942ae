"""Readings of any torch module, training or trained: outlier neurons, collapsing tokens, attention."""

from gramian.observe.examine import Observed, examine
from gramian.observe.peaks import Peak
from gramian.observe.probe import Probe, Sample, observe
from gramian.observe.record import Record

__all__ = ["Observed", "Peak", "Probe", "Record", "Sample", "examine", "observe"]
