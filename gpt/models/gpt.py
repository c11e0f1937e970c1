"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), exactly.

Shapes: B sequences, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size. Parameter names are those of the
released weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from gpt.configs.gpt_config import GPTConfig
from gpt.models.attention import DocumentMask, attend, positions_in_documents
from gpt.models.loss import head_loss

INIT_STD = 0.02
"""For every matrix and both embeddings, as Hugging Face and nanoGPT initialise GPT-2."""


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, mask: DocumentMask | None = None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        y = attend(q, k, v, mask, dropout=self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        out: torch.Tensor = self.resid_dropout(self.c_proj(y))
        return out


class MLP(nn.Module):
    """Two layers with GPT-2's gelu in between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        # The tanh form of gelu is what GPT-2 was trained with (Hendrycks and Gimpel 2016, section 2).
        out: torch.Tensor = self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))
        return out


class Block(nn.Module):
    """Pre-norm residual block: x + attention, then x + mlp."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, mask: DocumentMask | None = None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), mask)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """The language model; its head shares the token embedding's weight."""

    def __init__(self, config: GPTConfig, *, seed: int):
        """Build on the CPU with weights that depend on `config` and `seed` alone.

        Raises:
            ValueError: `config.vocab_size` is 0, which only a tokenizer can resolve.
        """
        super().__init__()
        if config.vocab_size == 0:
            raise ValueError("vocab_size=0 stands for the tokenizer's: set it before a model is built")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self._init_weights(torch.Generator().manual_seed(seed))

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor | None = None, documents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits, or with targets their loss.

        With `documents`, each of a row's documents gets what it would get alone: attention stays inside it, and its
        positions count from its first token in the row.

        Args:
            tokens: (B, T) int64, T <= block_size.
            targets: (B, T) int64, the token after each.
            documents: (B, T) int64, the number of the document that each token belongs to, non-decreasing along the
                row; padding at a row's end has a number of its own. Without it a row is one document.

        Returns:
            (B, T, V) logits; with targets the scalar sum of their negative log-likelihoods in nats, float32.
        """
        if documents is None:
            mask = None
            positions = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        else:
            mask = DocumentMask(
                documents,
                dropout=self.config.dropout if self.training else 0.0,
                head_width=self.config.n_embd // self.config.n_head,
            )
            positions = positions_in_documents(documents)  # (B, T)
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # (B, T, C)
        for block in self.h:
            x = block(x, mask)
        x = self.ln_f(x)
        if targets is not None:
            return head_loss(x, self.wte.weight, targets)
        return F.linear(x, self.wte.weight)  # (B, T, V)

    def _init_weights(self, generator: torch.Generator) -> None:
        # GPT-2 report, section 2.3: residual projections are scaled by 1/sqrt(N), N = 2 * n_layer residual additions.
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                std = residual_std if name.endswith("c_proj.weight") else INIT_STD
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
