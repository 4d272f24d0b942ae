"""How sure is a slice from 30 views? A field with dropout, error bars that unseen views have checked."""

import tempfile
from pathlib import Path

from rich.console import Console

from gramian.tasks.field_fits import Fit
from gramian.tasks.reconstruct import ReconstructConfig, reconstruct_scan
from gramian.tasks.scans import Source

with tempfile.TemporaryDirectory() as folder:
    config = ReconstructConfig(
        source=Source(scan="ellipses", size=48, views=30),
        fit=Fit(steps=300, device="cpu"),
        runs=Path(folder),
    )
    found = reconstruct_scan(config, Console(quiet=True))
for name, scores in found.scores().items():
    print(f"{name or 'field':>8}: {scores.psnr:.1f} dB")
doubt, check, spread = found.doubt_scores(), found.check, found.spread
assert doubt is not None
assert check is not None
assert spread is not None
print(f"unseen rays miss by {check.chi_square:.2f} of the variance that samples foretell (1 is right),")
print(f"so samples were spread by {spread.factor:.2f} ± {spread.error:.2f}; then")
print(f"95 % intervals hold {float(doubt.inside.randomised[-1]):.0%} of the pixels that are not surely empty")
