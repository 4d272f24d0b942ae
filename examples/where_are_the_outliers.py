"""Where are a language model's outliers? Any Hugging Face folder will do; in this one we plant a neuron."""

from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gramian.tasks.observe import observe_model
from gramian.tasks.observe_page import sentences

torch.manual_seed(0)
bytes_alone = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = Tokenizer(models.BPE(bytes_alone, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
sizes = {"vocab_size": 256, "n_positions": 64, "n_embd": 64, "n_layer": 4, "n_head": 4}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
with torch.no_grad():
    model.transformer.h[1].mlp.c_proj.bias[17] = 5  # an outlier neuron behind the second layer

with TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    seen = observe_model(folder, __file__)  # of a model of your own: its folder, and a text

for layer in seen.layers:
    print(f"{layer.label:>6}: neuron kurtosis {layer.readings['neuron_kurtosis']:5.2f}")
for sentence in sentences(seen):
    print(sentence)
