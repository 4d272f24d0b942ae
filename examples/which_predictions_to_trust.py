"""Which predictions can be trusted? Two ensembles say how sure they are, among their data and beyond them."""

import numpy as np

from gramian.data.tables import toy
from gramian.interop.sklearn import NTKEnsembleRegressor

PLACES = {"among the data": (0.7, 1.9), "in their gap": (-0.6, 0.6), "just beyond": (2.2, 3), "far": (4, 6)}
NOISE = 0.1

table = toy(20, noise=NOISE)  # y = x sin x + noise, on both sides of a gap
for method in ("deep_ensemble", "ntkgp_param"):
    model = NTKEnsembleRegressor(
        method, activation="erf", weight_std=1.5, bias_std=0.05, noise_variance=NOISE**2,
        steps=1000, learning_rate=0.005, standardise=False, random_state=0,
    )  # fmt: skip
    model.fit(table.x.numpy(), table.y.numpy())
    for where, ends in PLACES.items():
        x = np.linspace(*ends, 25)
        mean, deviation = model.predict(x[:, None], return_std=True)
        error = np.sqrt(np.mean((mean - x * np.sin(x)) ** 2))
        print(f"{method:>13}, {where:>14}: off by {error:.2f}, says ± {2 * deviation.mean():.2f}")
