"""How much smaller does a simplified block make a GPT-2? And what does it do before it learns anything."""

from dataclasses import replace

import torch

from gramian.nn.transformer import Transformer, TransformerConfig, build

gpt2 = TransformerConfig(vocabulary=50_257, context=1024, width=768, depth=12, heads=12)
for name in ("pre_norm", "sas", "sas_p"):
    with torch.device("meta"):  # sizes alone, no memory
        model = Transformer(replace(gpt2, block=name))
    blocks, total = model.block_parameters(), sum(p.numel() for p in model.parameters())
    print(f"{name:9} {blocks / 1e6:6.1f} M in the blocks, {total / 1e6:6.1f} M in all")

small = build(replace(gpt2, width=64, heads=4, depth=2, vocabulary=100, block="sas_p"), seed=0)
x = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
attention = small.blocks[1][1].branches[0]  # block 1 is a norm, then attention and MLP side by side
print(f"attention changes its input by {(attention(x) - x).abs().max():.1e} at the start: it is the identity")

tokens = torch.randint(100, (2, 10), generator=torch.Generator().manual_seed(1))
padded = torch.nn.functional.pad(tokens, (3, 0))
mask = torch.nn.functional.pad(torch.ones_like(tokens), (3, 0))
gap = (small(padded, mask)[:, 3:] - small(tokens)).abs().max()
print(f"three tokens of padding on the left change its logits by {gap:.1e}")
