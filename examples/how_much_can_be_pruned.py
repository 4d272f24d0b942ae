"""How much of a network can be pruned, and what is certain of its error? A tenth of the weights on digits."""

from gramian.compress.learning import Learning
from gramian.tasks.evidence import split_evidence
from gramian.tasks.pruning import Plan, prune
from gramian.tasks.pruning_data import Data
from gramian.tasks.pruning_networks import Network, build, train_dense
from gramian.tasks.self_bounded import Bounding

examples = Data().load()  # scikit-learn's digits, a fifth held out
evidence = split_evidence(examples, fraction=0.5, seed=0)  # half of the rest makes the prior, half the bound
x, y = evidence.x[evidence.prior], examples.y[evidence.prior]

network = build(Network("mlp", examples.size, examples.classes, (100,)), seed=0)
train_dense(network, x, y, steps=400, batch=64, rate=2e-3, seed=0)

plan = Plan(
    density=0.1,
    start="magnitude",
    learning=Learning(steps=300, learn="both"),
    bounding=Bounding(learning=Learning(steps=100), draws=2000),
)
found = prune(network, evidence, plan)
assert found is not None
assert found.guarantee is not None
assert found.guarantee.fixed is not None
print(f"the mask of largest weights: {found.baseline:.1%} of the held-out digits wrong")
print(f"learnt, drawn at random: {found.random:.1%}; the most probable mask: {found.fixed:.1%}")
print(found.guarantee.posterior.sentence)
print(found.guarantee.fixed.sentence)
