"""Which neurons of a model are outliers? Hooks read it; nothing about the model needs to be ours."""

import torch
from torch import nn

from gramian.observe import Probe
from gramian.observe.neurons import outlier_neurons

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
model = nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)
with torch.no_grad():
    model.layers[1].linear2.bias[17] = 40.0  # plant an outlier neuron behind the second layer

probe = Probe(model, "layers.*", every=10)
for step in range(20):
    with probe.sample(step) as sample:  # hooks exist only here, and only every tenth step
        model(torch.randn(8, 32, 64))
    if sample is not None:
        for site, values in sample.readings().items():
            print(f"step {step:2}  {site:16} neuron kurtosis {values['neuron_kurtosis']:6.2f}")
        worst = max(sample.streams, key=lambda site: sample.readings()[site]["neuron_kurtosis"])
        (neuron, share), *_ = outlier_neurons(sample.streams[worst], 1)
        print(f"step {step:2}  neuron {neuron} of {worst} carries {share:.0f} times the mean")
