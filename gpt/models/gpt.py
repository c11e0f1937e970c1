"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), exactly, and its descendants.

The configuration's defaults are GPT-2; its other values are what later models changed (the files of `gpt/ops` cite
them). Parameter names are those of the released weights. Shapes: B sequences, T tokens, C = n_embd, H = n_head,
K = n_kv_head, D = head_dim, F = intermediate_size, V = vocab_size.
"""

import torch
import torch.nn.functional as F
from torch import nn

from gpt.configs.gpt_config import GPTConfig
from gpt.models.init import init_weights
from gpt.ops.activations import ACTIVATIONS
from gpt.ops.attention import Attend, Cache, DocumentMask, attend, positions_in_documents
from gpt.ops.cross_entropy import LinearCrossEntropy, soft_cap, summed_cross_entropy
from gpt.ops.linear import FusedLinear, Linear, is_plain_linear
from gpt.ops.norm import build_norm
from gpt.ops.precision import compute_dtype, round_output
from gpt.ops.rope import Rope, RopeScaling, apply_rope, rope_cos_sin


def _norm(config: GPTConfig, width: int, *, rounds: bool = False) -> nn.Module:
    return build_norm(config.norm, width, eps=config.norm_eps, bias=config.bias, rounds=rounds)


def _embedding(n_rows: int, width: int) -> nn.Embedding:
    # Without its constructor's random weights, which `init_weights` would overwrite.
    embedding: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(n_rows, width), freeze=False)
    return embedding


class Attention(nn.Module):
    """Causal self-attention; groups of heads may share their keys and values."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.qkv_sizes = config.qkv_sizes
        self.c_attn = FusedLinear(config.n_embd, config.qkv_sizes, bias=bool(config.qkv_bias))
        self.c_proj = Linear(config.n_head * config.head_dim, config.n_embd, bias=bool(config.attn_out_bias))
        self.q_norm = _norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = _norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, mask: DocumentMask | None, rope: Rope | None, attend_cached: Attend | None = None
    ) -> torch.Tensor:
        """Attend to each token's past; (B, T, C) -> (B, T, C)."""
        B, T, _ = x.shape
        D = self.head_dim
        q, k, v = self.c_attn(x).split(self.qkv_sizes, dim=2)
        # With qk_norm the scores are bounded (Dehghani et al. 2023, section 2); without it these are identities.
        q = self.q_norm(q.view(B, T, -1, D)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(k.view(B, T, -1, D)).transpose(1, 2)  # (B, K, T, D)
        v = v.view(B, T, -1, D).transpose(1, 2)  # (B, K, T, D)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        if attend_cached is not None:
            y = attend_cached(q, k, v, mask)  # (B, H, T, D)
        else:
            y = attend(q, k, v, mask, dropout=self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H * D)
        out: torch.Tensor = self.resid_dropout(self.c_proj(y))
        return out


class MLP(nn.Module):
    """Two linear layers with an activation in between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = FusedLinear(config.n_embd, config.fc_sizes, bias=bool(config.mlp_bias))
        self.activation = ACTIVATIONS[config.mlp]
        self.c_proj = Linear(config.intermediate_size, config.n_embd, bias=bool(config.mlp_bias))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform each token by itself; (B, T, C) -> (B, T, C)."""
        out: torch.Tensor = self.dropout(self.c_proj(self.activation(self.c_fc(x))))
        return out


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = _norm(config, config.n_embd, rounds=True)
        self.attn = Attention(config)
        self.ln_2 = _norm(config, config.n_embd, rounds=True)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, mask: DocumentMask | None, rope: Rope | None, attend_cached: Attend | None = None
    ) -> torch.Tensor:
        """Add both branches to the residual stream; (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), mask, rope, attend_cached)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """The language model; by default its head shares the token embedding's weight."""

    def __init__(self, config: GPTConfig, *, seed: int | None):
        """Build with weights that depend on `config` and `seed` alone.

        Args:
            config: the architecture.
            seed: seed of the weights; None: they hold what is in memory, see `build_empty`.

        Raises:
            ValueError: `config.vocab_size` is 0, which only a tokenizer can resolve.
        """
        super().__init__()
        if config.vocab_size == 0:
            raise ValueError("vocab_size=0 stands for the tokenizer's: set it before a model is built")
        self.config = config = config.resolve()
        self.wte = _embedding(config.vocab_size, config.n_embd)
        self.wpe = _embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = _norm(config, config.n_embd)
        self.lm_head = None if config.tie_embeddings else Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss = LinearCrossEntropy(config.logit_softcap)
        if seed is not None:
            init_weights(self, config, seed)

    @classmethod
    def build_empty(cls, config: GPTConfig, device: torch.device, *, rounds_residuals: bool = False) -> "GPT":
        """Return a model on `device` whose weights hold what is in memory, for weights that are loaded or drawn later.

        Drawing takes some 12 ns per weight, on one thread.

        Args:
            config: the architecture.
            device: device of the weights.
            rounds_residuals: whether the residual stream has the compute dtype under autocast, and not float32.
        """
        with torch.device("meta"):
            model = cls(config, seed=None)
        if rounds_residuals:
            round_output(model.drop)
        return model.to_empty(device=device)

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Return the logits, or with targets their loss.

        With `documents`, each document of a row gets the outputs that it would get alone: attention stays inside it,
        and its positions count from its first token in the row.

        Args:
            tokens: (B, T) int64, T <= block_size.
            targets: (B, T) int64, the token after each.
            documents: (B, T) int64, the number of each token's document, non-decreasing along the row; padding at a
                row's end has a number of its own. Without it a row is one document.
            cache: keys and values of the tokens before these, to which those of these are added.

        Returns:
            (B, T, V) logits; with a cache those of each row's last token, (B, V); with targets the scalar sum of their
            negative log-likelihoods in nats, float32.
        """
        mask = rope = None
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        x = self.wte(tokens)  # (B, T, C)
        if documents is not None:
            positions = positions_in_documents(documents)  # (B, T)
        if cache is not None:
            positions = cache.positions  # (B, T)
        if documents is not None or 0 < self.config.sliding_window < tokens.shape[1]:
            mask = DocumentMask(
                torch.zeros_like(tokens) if documents is None else documents,
                dropout=self.config.dropout if self.training else 0.0,
                head_dim=self.config.head_dim,
                dtype=compute_dtype(x),
                window=self.config.sliding_window,
            )
        if self.wpe is not None:
            x = x + self.wpe(positions)  # (B, T, C)
        else:
            rope = self.compute_rope(positions)
        x = self.drop(x)
        for index, block in enumerate(self.h):
            x = block(x, mask, rope) if cache is None else block(x, mask, rope, cache.layers[index])
        if cache is not None:
            x = cache.select_last(x)  # (B, C)
        x = self.ln_f(x)
        softcap = self.config.logit_softcap
        if targets is None:
            return soft_cap(self._logits(x), softcap)
        if self.lm_head is None or is_plain_linear(self.lm_head):
            weight = self.wte.weight if self.lm_head is None else self.lm_head.weight
            loss: torch.Tensor = self.loss(x, weight, targets)
            return loss
        return summed_cross_entropy(self._logits(x), targets, softcap=softcap)

    def compute_rope(self, positions: torch.Tensor) -> Rope:
        """Return the rotary embeddings of positions, (T,) or (B, T) int64."""
        config = self.config
        return rope_cos_sin(positions, config.head_dim, config.rope_theta, build_rope_scaling(config))

    def hidden_matrices(self) -> dict[torch.Tensor, tuple[int, ...]]:
        """Return the weights of the blocks' linear layers, each with the rows of every matrix that is fused in it."""
        return {
            parameter: module.sizes if isinstance(module, FusedLinear) else (module.out_features,)
            for module in self.h.modules()
            if isinstance(module, nn.Linear)
            for name, parameter in module.named_parameters(recurse=False)
            if name == "weight"
        }

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the head; (B, T, C) -> (B, T, V)."""
        return F.linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x)


def build_rope_scaling(config: GPTConfig) -> RopeScaling | None:
    """Return the scaling of the rotary embeddings; None if they are not scaled."""
    if config.rope_scaling == "none":
        return None
    return RopeScaling(
        config.rope_factor,
        config.rope_low_freq_factor,
        config.rope_high_freq_factor,
        config.rope_original_block_size,
    )


def shorten_context(weights: dict[str, torch.Tensor], block_size: int) -> dict[str, torch.Tensor]:
    """Return the weights of the same model with a shorter context: without the learned positions beyond it."""
    positions = weights.get("wpe.weight")
    return weights if positions is None else weights | {"wpe.weight": positions[:block_size].contiguous()}
