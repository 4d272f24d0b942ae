"""Kernels by neural-tangents in a process, and an environment, of its own; `kernels.py` starts and asks it.

Reads one request a line, `dense NAME DEPTH` or `images SIZE`, and answers `done`; `save PATH` keeps the last
kernels. The inputs are in the folder given as the argument. It needs neural-tangents, not gramian.
"""

import os
import sys
from pathlib import Path

import numpy as np

folder, cores = Path(sys.argv[1]), int(sys.argv[2])
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])

import jax  # noqa: E402  (it counts the cores when it is imported)

jax.config.update("jax_enable_x64", True)

import neural_tangents  # noqa: E402
from neural_tangents import stax  # noqa: E402


def dense(name, depth):
    activation = {"relu": stax.Relu(), "gelu": stax.Gelu(approximate=False)}[name]
    layer = stax.Dense(1, W_std=1.5, b_std=0.1)
    return stax.serial(layer, *[activation, layer] * depth)[2]


def images(size):
    convolution = stax.Conv(1, (3, 3), padding="SAME", W_std=2**0.5, b_std=0.0)
    layers = [convolution, stax.Relu(), convolution, stax.Relu()]
    while size > 4:
        layers += [stax.AvgPool((2, 2), strides=(2, 2)), convolution, stax.Relu()]
        size //= 2
    return stax.serial(*layers, stax.GlobalAvgPool(), stax.Dense(1, W_std=1.0, b_std=0.0))[2]


def jitted(kernel):
    return jax.jit(lambda x, y: tuple(kernel(x, y, ("nngp", "ntk"))))


functions, last = {}, ()
print(f"jax {jax.__version__}, neural-tangents {neural_tangents.__version__}", flush=True)
for line in sys.stdin:
    what, *details = line.split()
    if what == "save":
        np.save(details[0], np.stack(last))
    else:
        if line not in functions:
            made = dense(details[0], int(details[1])) if what == "dense" else images(int(details[0]))
            functions[line] = jitted(made)
        x = np.load(folder / f"{what}_{details[0]}_x.npy")
        y = folder / f"{what}_{details[0]}_y.npy"
        last = jax.block_until_ready(functions[line](x, np.load(y) if y.exists() else None))
    print("done", flush=True)
