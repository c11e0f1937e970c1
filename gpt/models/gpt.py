"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), exactly, and its descendants.

The configuration's defaults are GPT-2; its other values are what later models changed (`gpt/ops/layers.py` cites
them). Shapes: B sequences, T tokens, C = n_embd, H = n_head, K = n_kv_head, D = C / H, F = intermediate_size,
V = vocab_size. Parameter names are those of the released weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from gpt.configs.gpt_config import GPTConfig
from gpt.ops.attention import DocumentMask, attend, positions_in_documents
from gpt.ops.cross_entropy import head_loss
from gpt.ops.layers import (
    ACTIVATIONS,
    FusedLinear,
    Rotation,
    compute_dtype,
    linear_of,
    make_norm,
    rotate,
    rotation,
    soft_cap,
)

INIT_STD = 0.02
"""For every matrix and both embeddings, as Hugging Face and nanoGPT initialise GPT-2."""


class Attention(nn.Module):
    """Causal self-attention, in which several heads may share their keys and values."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.group_size = config.n_head // config.kv_heads
        self.dropout = config.dropout
        kv_width = config.kv_heads * config.head_dim
        self.c_attn = FusedLinear(config.n_embd, (config.n_embd, kv_width, kv_width), bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, norm: nn.Module, x: torch.Tensor, mask: DocumentMask | None, turn: Rotation | None
    ) -> torch.Tensor:
        """(B, T, C) -> (B, T, C), of `norm(x)`."""
        B, T, C = x.shape
        D = self.head_dim
        q, k, v = linear_of(norm, x, self.c_attn).split(self.c_attn.parts, dim=2)
        # Without qk_norm these two are identities; with it the scores are bounded (Dehghani et al. 2023, section 2).
        q = self.q_norm(q.view(B, T, -1, D)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(k.view(B, T, -1, D)).transpose(1, 2)  # (B, K, T, D)
        v = v.view(B, T, -1, D).transpose(1, 2)  # (B, K, T, D)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        if self.group_size > 1:  # heads of a group share keys and values (Ainslie et al. 2023, "GQA")
            k = k.repeat_interleave(self.group_size, dim=1)  # (B, H, T, D)
            v = v.repeat_interleave(self.group_size, dim=1)  # (B, H, T, D)
        y = attend(q, k, v, mask, dropout=self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        out: torch.Tensor = self.resid_dropout(self.c_proj(y))
        return out


class MLP(nn.Module):
    """Two layers with an activation in between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.mlp]
        self.c_fc = FusedLinear(config.n_embd, config.mlp_parts, bias=config.bias)
        self.c_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C), of `norm(x)`."""
        x = linear_of(norm, x, self.c_fc)  # (B, T, F)
        out: torch.Tensor = self.dropout(linear_of(self.activation, x, self.c_proj))
        return out


class Block(nn.Module):
    """Pre-norm residual block: x + attention, then x + mlp."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, mask: DocumentMask | None, turn: Rotation | None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1, x, mask, turn)
        x = x + self.mlp(self.ln_2, x)
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
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config, config.n_embd)
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
                head_dim=self.config.head_dim,
                dtype=compute_dtype(self.wte.weight),
            )
            positions = positions_in_documents(documents)  # (B, T)
        x = self.wte(tokens)  # (B, T, C)
        turn = None
        if self.wpe is not None:
            x = x + self.wpe(positions)
        else:
            turn = rotation(positions, self.config.head_dim)
        x = self.drop(x)
        for block in self.h:
            x = block(x, mask, turn)
        x = self.ln_f(x)
        if targets is not None:
            return head_loss(x, self.wte.weight, targets, softcap=self.config.logit_softcap)
        return soft_cap(F.linear(x, self.wte.weight), self.config.logit_softcap)  # (B, T, V)

    def hidden_matrices(self) -> dict[torch.Tensor, tuple[int, ...]]:
        """The weights of the blocks' linear layers, each with the rows of the layers that are fused in it."""
        layers = [module for module in self.h.modules() if isinstance(module, nn.Linear)]
        return {m.weight: m.parts if isinstance(m, FusedLinear) else (m.out_features,) for m in layers}

    def _init_weights(self, generator: torch.Generator) -> None:
        # GPT-2 report, section 2.3: residual projections are scaled by 1/sqrt(N), N = 2 * n_layer residual additions.
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                std = residual_std if name.endswith("c_proj.weight") else INIT_STD
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
