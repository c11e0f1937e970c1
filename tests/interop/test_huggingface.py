import pytest
import torch

from gpt.errors import UserError
from gpt.interop.hf_config import describe_config, parse_config
from gpt.interop.huggingface import export_tensors, import_tensors
from tests.interop.families import CHANGES, make_config, make_model


@pytest.mark.parametrize("name", CHANGES)
def test_imported_tensors_are_those_that_were_exported(name: str) -> None:
    model = make_model(name)
    theirs = export_tensors(model.state_dict(), model.config)
    ours = import_tensors(theirs, parse_config(describe_config(model.config)))
    for key, tensor in model.state_dict().items():
        assert torch.equal(ours.pop(key), tensor), key
    assert all(key.endswith("bias") and not tensor.any() for key, tensor in ours.items())


def test_released_gpt2_names_and_buffers_are_accepted() -> None:
    model = make_model("gpt2")
    theirs = export_tensors(model.state_dict(), model.config)
    released = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    released |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    assert import_tensors(released, model.config).keys() == model.state_dict().keys()


def test_a_copy_of_a_tied_head_is_accepted() -> None:
    model = make_model("llama")
    theirs = export_tensors(model.state_dict(), model.config)
    theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"].clone()
    assert import_tensors(theirs, model.config).keys() == model.state_dict().keys()


def broken_tensors(name: str) -> dict[str, torch.Tensor]:
    theirs = export_tensors(make_model("llama").state_dict(), make_config("llama"))
    match name:
        case "missing":
            del theirs["model.norm.weight"], theirs["model.layers.1.mlp.up_proj.weight"]
        case "extra":
            theirs["model.layers.2.mlp.up_proj.weight"] = torch.zeros(50, 48)
        case "misshapen":
            theirs["model.norm.weight"] = torch.zeros(47)
        case "many":
            theirs = {key: tensor for key, tensor in theirs.items() if "layers.0" not in key}
        case "head":
            theirs["lm_head.weight"] = torch.zeros_like(theirs["model.embed_tokens.weight"])
    return theirs


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight$"),
        ("extra", "not in this model: model.layers.2.mlp.up_proj.weight"),
        ("misshapen", r"other shapes: model.norm.weight is \(47,\) and not \(48,\)"),
        ("many", r"missing: model.layers.0.input_layernorm.weight, .* and 6 more"),
        ("head", "lm_head.weight differs from model.embed_tokens.weight, but config.json has tie_word_embeddings true"),
    ],
)
def test_wrong_tensors_are_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_tensors(broken_tensors(name), make_config("llama"))


def test_a_missing_untied_head_is_explained() -> None:
    with pytest.raises(UserError, match=r"missing: lm_head.weight; .* config.json needs tie_word_embeddings true"):
        import_tensors(broken_tensors(""), make_config("llama", tie_embeddings=False))
