"""Tensors of transformers <-> ours: names, layouts and nothing else.

ours                     GPT-2 (Conv1D: transposed)    Llama, Mistral, Qwen 2, Qwen 3
wte                      transformer.wte               model.embed_tokens
wpe                      transformer.wpe
h.I.ln_1                 transformer.h.I.ln_1          model.layers.I.input_layernorm
h.I.attn.c_attn          transformer.h.I.attn.c_attn   model.layers.I.self_attn.{q,k,v}_proj, concatenated
h.I.attn.[qk]_norm                                     model.layers.I.self_attn.[qk]_norm
h.I.attn.c_proj          transformer.h.I.attn.c_proj   model.layers.I.self_attn.o_proj
h.I.ln_2                 transformer.h.I.ln_2          model.layers.I.post_attention_layernorm
h.I.mlp.c_fc             transformer.h.I.mlp.c_fc      model.layers.I.mlp.{gate,up}_proj, concatenated
h.I.mlp.c_proj           transformer.h.I.mlp.c_proj    model.layers.I.mlp.down_proj
ln_f                     transformer.ln_f              model.norm
lm_head, unless tied     lm_head                       lm_head
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch

from gpt.configs.gpt_config import GPTConfig
from gpt.errors import UserError
from gpt.interop.families import Family, require_family

Tensors = dict[str, torch.Tensor]

MAX_NAMES_SHOWN = 3
"""Names of wrong tensors that an error lists."""
BUFFERS = ("*.attn.bias", "*.attn.masked_bias", "*.rotary_emb.inv_freq")
"""Patterns of tensors that older versions saved although they are no parameters."""


class Layer(NamedTuple):
    """A layer of ours and the layers of theirs that it is the concatenation of."""

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...]
    """Output channels of each of theirs."""
    n_in: int | None = None
    """Input channels of a matrix; None for a vector."""
    has_bias: bool = False
    """Theirs has a bias; ours may lack it, and then theirs is 0."""
    is_transposed: bool = False
    """Theirs holds its weight as (n_in, n_out)."""


def export_tensors(ours: Mapping[str, torch.Tensor], config: GPTConfig, family: Family | None = None) -> Tensors:
    """Return the tensors of a model under transformers' names and in its layout.

    Args:
        ours: state dict of a GPT.
        config: its resolved configuration.
        family: class to export to; None: the closest.

    Raises:
        UserError: no class of transformers has this configuration.
    """
    theirs: Tensors = {}
    for layer in list_layers(config, family or require_family(config)):
        parts = ours[f"{layer.ours}.weight"].split(layer.sizes)
        theirs |= {
            f"{name}.weight": (part.T if layer.is_transposed else part).contiguous()
            for name, part in zip(layer.theirs, parts, strict=True)
        }
        if layer.has_bias:
            bias = ours.get(f"{layer.ours}.bias")
            bias = parts[0].new_zeros(sum(layer.sizes)) if bias is None else bias
            named = zip(layer.theirs, bias.split(layer.sizes), strict=True)
            theirs |= {f"{name}.bias": part.contiguous() for name, part in named}
    return theirs


def import_tensors(theirs: Mapping[str, torch.Tensor], config: GPTConfig) -> Tensors:
    """Return the tensors of a model under our names and in our layout; the inverse of `export_tensors`.

    Args:
        theirs: tensors under transformers' names, with or without the prefix of the model without its head.
        config: resolved configuration, from `parse_config`.

    Raises:
        UserError: tensors are missing, superfluous or of other shapes, or a tied head is not the embedding.
    """
    layers = list(list_layers(config, require_family(config)))
    theirs = _add_prefix(theirs, layers[0].theirs[0].split(".")[0])
    _require_expected(theirs, layers, is_tied=config.tie_embeddings)
    ours: Tensors = {}
    for layer in layers:
        weights = [theirs[f"{name}.weight"] for name in layer.theirs]
        ours[f"{layer.ours}.weight"] = torch.cat([w.T if layer.is_transposed else w for w in weights])
        if layer.has_bias:
            ours[f"{layer.ours}.bias"] = torch.cat([theirs[f"{name}.bias"] for name in layer.theirs])
    return ours


def list_layers(config: GPTConfig, family: Family) -> Iterator[Layer]:
    """Yield the layers of a resolved configuration with the names that a class of transformers has for them."""
    embeddings = {"gpt2": "transformer.wte"}.get(family.model_type, "model.embed_tokens")
    yield Layer("wte", (embeddings,), (config.vocab_size,), config.n_embd)
    if family.model_type == "gpt2":
        yield Layer("wpe", ("transformer.wpe",), (config.block_size,), config.n_embd)
    for index in range(config.n_layer):
        if family.model_type == "gpt2":
            yield from _list_gpt2_block(config, index)
        else:
            yield from _list_descendant_block(config, index, family.model_type)
    if family.model_type == "gpt2":
        yield Layer("ln_f", ("transformer.ln_f",), (config.n_embd,), has_bias=True)
    else:
        yield Layer("ln_f", ("model.norm",), (config.n_embd,))
    if not config.tie_embeddings:
        yield Layer("lm_head", ("lm_head",), (config.vocab_size,), config.n_embd)


def _list_gpt2_block(config: GPTConfig, index: int) -> Iterator[Layer]:
    def linear(name: str, n_in: int, n_out: int) -> Layer:
        return Layer(f"h.{index}.{name}", (f"transformer.h.{index}.{name}",), (n_out,), n_in, True, True)

    def norm(name: str) -> Layer:
        return Layer(f"h.{index}.{name}", (f"transformer.h.{index}.{name}",), (config.n_embd,), has_bias=True)

    yield norm("ln_1")
    yield linear("attn.c_attn", config.n_embd, 3 * config.n_embd)
    yield linear("attn.c_proj", config.n_embd, config.n_embd)
    yield norm("ln_2")
    yield linear("mlp.c_fc", config.n_embd, config.intermediate_size)
    yield linear("mlp.c_proj", config.intermediate_size, config.n_embd)


def _list_descendant_block(config: GPTConfig, index: int, model_type: str) -> Iterator[Layer]:
    def layer(ours: str, theirs: str, sizes: tuple[int, ...], n_in: int | None = None, bias: bool = False) -> Layer:
        names = tuple(f"model.layers.{index}.{name}" for name in theirs.split())
        return Layer(f"h.{index}.{ours}", names, sizes, n_in, bias)

    attention_bias = bool(config.qkv_bias or config.attn_out_bias)
    width, query_size = config.n_embd, config.qkv_sizes[0]
    qkv = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
    yield layer("ln_1", "input_layernorm", (width,))
    yield layer("attn.c_attn", qkv, config.qkv_sizes, width, attention_bias)
    if config.qk_norm:
        yield layer("attn.q_norm", "self_attn.q_norm", (config.head_dim,))
        yield layer("attn.k_norm", "self_attn.k_norm", (config.head_dim,))
    # Qwen 2 has biases of queries, keys and values alone.
    yield layer("attn.c_proj", "self_attn.o_proj", (width,), query_size, attention_bias and model_type != "qwen2")
    yield layer("ln_2", "post_attention_layernorm", (width,))
    yield layer("mlp.c_fc", "mlp.gate_proj mlp.up_proj", config.fc_sizes, width, bool(config.mlp_bias))
    yield layer("mlp.c_proj", "mlp.down_proj", (width,), config.intermediate_size, bool(config.mlp_bias))


def list_shapes(layers: list[Layer]) -> dict[str, tuple[int, ...]]:
    """Return transformers' name -> shape of every tensor of these layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        for name, size in zip(layer.theirs, layer.sizes, strict=True):
            matrix = (size,) if layer.n_in is None else (size, layer.n_in)
            shapes[f"{name}.weight"] = matrix[::-1] if layer.is_transposed else matrix
            if layer.has_bias:
                shapes[f"{name}.bias"] = (size,)
    return shapes


def _add_prefix(theirs: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    """Return the tensors without buffers, under the names that the model with its head gives them.

    GPT-2's released weights, and every model saved without its head, lack the prefix.
    """
    parameters = {
        name: tensor for name, tensor in theirs.items() if not any(fnmatchcase(f".{name}", each) for each in BUFFERS)
    }
    if any(name.startswith(f"{prefix}.") for name in parameters):
        return parameters
    return {name if name.startswith("lm_head.") else f"{prefix}.{name}": parameters[name] for name in parameters}


def _require_expected(theirs: Tensors, layers: list[Layer], *, is_tied: bool) -> None:
    """Check names, shapes and a tied head; the copy of a tied head is taken out of `theirs`.

    Raises:
        UserError: names the tensors that are missing, superfluous or of other shapes.
    """
    embedding = f"{layers[0].theirs[0]}.weight"
    head = theirs.pop("lm_head.weight", None) if is_tied else None
    expected = list_shapes(layers)
    missing = [name for name in expected if name not in theirs]
    extra = [name for name in theirs if name not in expected]
    misshapen = [
        f"{name} is {tuple(theirs[name].shape)} and not {shape}"
        for name, shape in expected.items()
        if name in theirs and tuple(theirs[name].shape) != shape
    ]
    problems = [
        f"{what}: {_join(names)}"
        for what, names in (("missing", missing), ("not in this model", extra), ("other shapes", misshapen))
        if names
    ]
    if problems:
        hint = ""
        if "lm_head.weight" in missing:
            hint = "; with a head that shares the embedding's weight, config.json needs tie_word_embeddings true"
        raise UserError(f"the tensors are not those that config.json describes: {'; '.join(problems)}{hint}")
    if head is not None and not torch.equal(head, theirs[embedding]):
        raise UserError(
            f"lm_head.weight differs from {embedding}, but config.json has tie_word_embeddings true; set it to false"
        )


def _join(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES_SHOWN])
    return shown if len(names) <= MAX_NAMES_SHOWN else f"{shown} and {len(names) - MAX_NAMES_SHOWN} more"
