"""Characters of Shakespeare and a small GPT: 4 layers of 4 heads and 128 channels, a context of 64.

python -m agnmpi simulate examples/evidence/shakespeare.py:Shakespeare --set options.path=FILE --workers 4 \\
    --batch 12 --steps 2000 --optimizer adamw --set optimizer_options.beta2=0.99 --weight-decay 0.1 --clip 1
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch_problem import TorchProblem


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); no position sees a later one."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = (nn.Linear(channels, k * channels, bias=False) for k in (3, 1))
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels, bias=False), nn.GELU(), nn.Linear(4 * channels, channels, bias=False)
        )

    def forward(self, x):
        samples, length, channels = x.shape
        parts = self.qkv(self.before_attention(x)).view(samples, length, 3, self.heads, channels // self.heads)
        y = F.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(samples, length, channels))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    """Logits of the next character at each position; the weights of input and output are the same."""

    def __init__(self, characters, context, channels, heads, layers):
        super().__init__()
        self.characters, self.positions = nn.Embedding(characters, channels), nn.Embedding(context, channels)
        self.blocks = nn.Sequential(*(Block(channels, heads) for _ in range(layers)), nn.LayerNorm(channels))
        for name, p in self.named_parameters():
            if p.dim() > 1:  # what adds to the residual stream starts smaller
                nn.init.normal_(p, std=0.02 / (2 * layers) ** (0.5 * name.endswith(("out.weight", "mlp.2.weight"))))

    def forward(self, text):
        x = self.characters(text) + self.positions.weight[: text.shape[1]]
        return F.linear(self.blocks(x), self.characters.weight)


class Shakespeare(TorchProblem):
    """`path`: of the text, the last tenth of which is held out; a sample is where a context begins."""

    def __init__(self, xp=np, path="input.txt", context=64, channels=128, heads=4, layers=4):
        text = Path(path).read_text()
        self.characters = sorted(set(text))
        codes = {character: code for code, character in enumerate(self.characters)}
        codes = torch.tensor([codes[character] for character in text])
        self.text, held_out = codes.split([len(codes) * 9 // 10, len(codes) - len(codes) * 9 // 10])
        self.context, self.shape = context, (channels, heads, layers)
        self.offsets = torch.arange(context + 1)
        self.samples = len(self.text) - context
        self.held_out = held_out.unfold(0, context + 1, 2 * context)  # every second context

    def network(self):
        return GPT(len(self.characters), self.context, *self.shape)

    def loss(self, model, indices):
        return _loss(model, self.text[torch.from_numpy(indices)[:, None] + self.offsets])

    def measure(self, model):
        """The mean loss over half of the held-out text."""
        parts = self.held_out.split(64)
        return {"loss": sum(_loss(model, part).item() * len(part) for part in parts) / len(self.held_out)}


def _loss(model, text):
    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
