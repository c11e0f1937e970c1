"""The architecture of the model, by default GPT-2's; `TrainConfig` sets that of the quickstart run."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gpt.configs.base import Config
from gpt.configs.resume_rule import NEEDS_FLAG

NORM_EPS = {"layernorm": 1e-5, "rmsnorm": 1e-6}
"""Defaults of `norm_eps`: as in GPT-2, and as in Llama and Qwen 3."""

INIT_STD = 0.02
"""Standard deviation of the initial matrices, as in the released code of GPT-2, Llama and Qwen."""


class GPTConfig(Config):
    """A GPT: names as in the GPT-2 report and its released code, which the defaults of all but the sizes follow."""

    n_layer: int = Field(3, ge=1, le=10_000)
    """Transformer blocks."""
    n_head: int = Field(4, ge=1, le=1_000_000)
    """Attention heads."""
    n_kv_head: int = Field(0, ge=0, le=1_000_000)
    """Heads of keys and values, shared by groups of attention heads; divides n_head; 0: n_head."""
    n_embd: int = Field(256, ge=1, le=1_000_000)
    """Width of the residual stream, in channels."""
    head_dim: int = Field(0, ge=0, le=1_000_000)
    """Channels of one attention head; 0: n_embd / n_head."""
    intermediate_size: int = Field(0, ge=0, le=10_000_000)
    """Channels of the MLP's hidden layer; 0: 4 * n_embd, or for swiglu two thirds of that, rounded up to a multiple
    of 8."""
    block_size: int = Field(128, ge=1, le=2**26)
    """Longest context in tokens; one training sequence is this long."""
    vocab_size: int = Field(0, ge=0, le=2**31)
    """Rows of the embedding; 0: the tokenizer's vocabulary; a larger number pads it."""
    # NEEDS_FLAG, not FORBIDDEN: no weight's shape or meaning depends on it.
    dropout: Annotated[float, NEEDS_FLAG] = Field(0.0, ge=0, lt=1)
    """Probability of dropping an activation (embeddings, attention weights, residual branches)."""
    bias: bool = True
    """Biases in linear layers and layer norms, as in GPT-2."""
    qkv_bias: bool | None = None
    """Biases of the query, key and value projections; none: same as bias."""
    attn_out_bias: bool | None = None
    """Bias of the attention's output projection; none: same as bias."""
    mlp_bias: bool | None = None
    """Biases of the MLP; none: same as bias."""
    position: Literal["learned", "rotary"] = "learned"
    """Position information: a learned embedding (GPT-2), or rotary embeddings of queries and keys (RoPE)."""
    rope_theta: float = Field(10_000.0, gt=0, le=1e12)
    """Base of the rotary embeddings' wavelengths."""
    rope_scaling: Literal["none", "llama3"] = "none"
    """Scaling of the rotary embeddings to a longer context; llama3: long wavelengths grow, as in Llama 3.1 to 3.3."""
    rope_factor: float = Field(8.0, ge=1, le=1e6)
    """Factor of the long wavelengths with rope_scaling llama3."""
    rope_low_freq_factor: float = Field(1.0, gt=0, le=1e6)
    """Wavelengths above rope_original_block_size / rope_low_freq_factor tokens grow by the whole rope_factor."""
    rope_high_freq_factor: float = Field(4.0, gt=0, le=1e6)
    """Wavelengths below rope_original_block_size / rope_high_freq_factor tokens stay as they are."""
    rope_original_block_size: int = Field(8192, ge=1, le=2**26)
    """Context in tokens that the model was first trained with; used by rope_scaling llama3."""
    sliding_window: int = Field(0, ge=0, le=2**26)
    """Tokens that each token attends to, itself included, as in Mistral 7B; 0: its whole past."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Norm before each branch of a block and before the head."""
    norm_eps: float = Field(0.0, ge=0, le=1)
    """Number added to the variance in a norm; 0: 1e-5 for layernorm, 1e-6 for rmsnorm."""
    mlp: Literal["gelu", "gelu_erf", "relu2", "swiglu"] = "gelu"
    """Activation of the MLP: gelu is the tanh approximation (GPT-2), gelu_erf the exact GELU (nanoGPT), relu2 the
    squared ReLU, swiglu the gated SiLU (Llama)."""
    qk_norm: bool = False
    """Normalise the queries and keys of each head."""
    tie_embeddings: bool = True
    """Share one matrix between the token embedding and the head, as in GPT-2."""
    logit_softcap: float = Field(0.0, ge=0, le=1e6)
    """Smooth bound of the logits, cap * tanh(logits / cap); 0: none."""
    init: Literal["gpt2", "llama"] = "gpt2"
    """Initial weights: gpt2 scales the residual projections by 1 / sqrt(2 n_layer); llama does not, as Qwen."""
    init_std: float = Field(INIT_STD, gt=0, le=10)
    """Standard deviation of the initial matrices and embeddings."""

    def resolve(self) -> "GPTConfig":
        """Return a copy in which every derived field has its value; `vocab_size` 0 stays, only a tokenizer knows it."""
        biases = {
            name: self.bias if getattr(self, name) is None else getattr(self, name)
            for name in ("qkv_bias", "attn_out_bias", "mlp_bias")
        }
        return self.model_copy(
            update=biases
            | {
                "n_kv_head": self.n_kv_head or self.n_head,
                "head_dim": self.head_dim or self.n_embd // self.n_head,
                "intermediate_size": self.intermediate_size or self._default_intermediate_size(),
                "norm_eps": self.norm_eps or NORM_EPS[self.norm],
            }
        )

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Channels of all heads' queries, keys and values; of a resolved configuration."""
        kv_size = self.n_kv_head * self.head_dim
        return self.n_head * self.head_dim, kv_size, kv_size

    @property
    def fc_sizes(self) -> tuple[int, ...]:
        """Channels of the matrices fused in the MLP's first layer (two for swiglu); of a resolved configuration."""
        return (self.intermediate_size,) * (2 if self.mlp == "swiglu" else 1)

    @property
    def n_parameters(self) -> int:
        """Number of trained parameters; a tied head counts once."""
        c = self.resolve()
        norm = 2 if c.bias and c.norm == "layernorm" else 1  # parameters per channel: a weight, perhaps a bias
        qkv, fc, attn_out = sum(c.qkv_sizes), sum(c.fc_sizes), c.qkv_sizes[0]
        block = c.n_embd * (qkv + attn_out + fc + c.intermediate_size)
        block += (qkv if c.qkv_bias else 0) + (c.n_embd if c.attn_out_bias else 0)
        block += (fc + c.n_embd) if c.mlp_bias else 0
        block += 2 * norm * c.n_embd + (2 * norm * c.head_dim if c.qk_norm else 0)
        embedded = c.vocab_size * (1 if c.tie_embeddings else 2) + (c.block_size if c.position == "learned" else 0)
        return (embedded + norm) * c.n_embd + c.n_layer * block

    def _default_intermediate_size(self) -> int:
        if self.mlp == "swiglu":  # two thirds of 4 * n_embd (Shazeer 2020, section 3), to a multiple of 8
            return -(-8 * self.n_embd // 24) * 8
        return 4 * self.n_embd

    @model_validator(mode="after")
    def _require_divisible_heads(self) -> Self:
        if not self.head_dim and self.n_embd % self.n_head:
            nearest = _nearest_multiples(self.n_embd, self.n_head)
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head} (nearest: {nearest}); or set head_dim"
            )
        n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % n_kv_head:
            divisor = next(n for n in range(min(n_kv_head, self.n_head), 0, -1) if self.n_head % n == 0)
            raise ValueError(f"n_kv_head={n_kv_head} does not divide n_head={self.n_head} (nearest: {divisor})")
        if self.position == "rotary" and self.resolve().head_dim % 2:
            raise ValueError(f"position=rotary needs an even head_dim: {self._odd_head_dim()}")
        return self

    @model_validator(mode="after")
    def _require_usable_rope_scaling(self) -> Self:
        if self.rope_scaling == "none":
            return self
        if self.position != "rotary":
            raise ValueError(f"rope_scaling={self.rope_scaling} needs position=rotary; set it, or rope_scaling=none")
        if self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise ValueError(
                f"rope_low_freq_factor={self.rope_low_freq_factor} is not below "
                f"rope_high_freq_factor={self.rope_high_freq_factor}; Llama 3.1 has 1 and 4"
            )
        return self

    def _odd_head_dim(self) -> str:
        """Return where an odd head_dim comes from, and the nearest values that make it even."""
        if self.head_dim:
            return f"head_dim={self.head_dim} is odd (nearest: {_nearest_multiples(self.head_dim, 2)})"
        nearest = _nearest_multiples(self.n_embd, 2 * self.n_head)
        head_dim = self.resolve().head_dim
        return f"n_embd={self.n_embd} over n_head={self.n_head} makes it {head_dim} (nearest n_embd: {nearest})"


def _nearest_multiples(number: int, divisor: int) -> str:
    """Return the positive multiples of `divisor` next to `number`, below and above."""
    below = number - number % divisor
    return " or ".join(str(n) for n in (below, below + divisor) if n)
