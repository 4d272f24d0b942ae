"""Readings of any torch module, training or trained: outlier neurons, collapsing tokens, attention."""

from gramian.observe.probe import Probe, Sample, observe
from gramian.observe.record import Record

__all__ = ["Probe", "Record", "Sample", "observe"]
