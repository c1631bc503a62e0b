"""Checkpoints of encoder–decoders: what their settings say and leave unsaid, there and back; against all stored outputs."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import resolve
from moe_jax.interop.convert import export_run, import_checkpoint
from moe_jax.interop.huggingface import to_config
from moe_jax.interop.pair_outputs import nllb_losses, switch_losses
from moe_jax.interop.pairs import own_tables
from moe_jax.interop.reading import parameter_shapes, tensors_of
from moe_jax.interop.safetensors_files import read_header, write_file
from moe_jax.interop.settings import InteropError
from moe_jax.interop.verify import verify

FOLDER = Path(__file__).parents[2] / "shared" / "oracles" / "hf"
SWITCH = dict(model_type="switch_transformers", vocab_size=96, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=6,
              num_decoder_layers=4, num_sparse_encoder_layers=3, num_sparse_decoder_layers=4, num_experts=4, expert_capacity=9)
NLLB = dict(model_type="nllb-moe", vocab_size=96, d_model=16, encoder_layers=4, decoder_layers=6, encoder_ffn_dim=24,
            decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2, encoder_sparse_step=2, decoder_sparse_step=3,
            num_experts=4, pad_token_id=5)


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the stored outputs are not here: {FOLDER}")
@pytest.mark.parametrize("family", ["switch_transformers", "nllb_moe"])
def test_everything_stored_is_what_we_compute(family):
    found = verify(FOLDER / family, "config.hub.json")
    assert {each.kind for each in found} == {"logits", "layer_out", "experts", "combine", "moe_out", "router_logits", "loss",
                                             "grad", "grad_l2"}
    assert not [each for each in found if not each.passes(1e-4)]
    numbers = json.loads((FOLDER / family / "oracle.json").read_text())
    assert {each.name for each in found if each.kind == "loss"} == {name for name in numbers if "loss" in name and name[:4] != "grad"}


@pytest.mark.parametrize("layers, sparse, expected", [
    (4, 2, [1, 3]),  # step 2
    (6, 2, [1, 4]),  # step 3
    (6, 3, [1, 3, 5]),
    (5, 2, [1, 3]),  # step 2
    (4, 4, [0, 1, 2, 3]),  # step 1: all
    (4, 3, [0, 1, 2, 3]),  # 4 // 3 = 1: all
    (2, 3, []),  # 2 // 3 = 0: none
    (4, 0, [1]),  # a step of all four
])
def test_switchs_sparse_layers(layers, sparse, expected):
    _, config = to_config({**SWITCH, "num_layers": layers, "num_sparse_encoder_layers": sparse})
    assert list(config.encoder_moe_layers) == expected


def test_switch_settings_there_and_back():
    family, config = to_config(SWITCH)
    assert config.decoder_moe_layers == (0, 1, 2, 3) and config.moe_layers == (1, 3, 5, 6, 7, 8, 9)
    assert config.moe.expert_capacity == 9 and config.moe.padding == "as_text" and not config.model.scaled_attention
    assert config.model.tie_embedding and config.model.scaled_tied_logits
    settings = family.from_config(config, 96)
    assert to_config({**settings, "model_type": "switch_transformers"})[1] == config
    assert {name: settings[name] for name in SWITCH if name != "model_type"} == {
        name: value for name, value in SWITCH.items() if name != "model_type"}


@pytest.mark.parametrize("options", [
    {}, dict(batch_prioritized_routing=True, normalize_router_prob_before_dropping=True, moe_token_dropout=0.0,
             moe_eval_capacity_token_fraction=0.3),
    dict(router_ignore_padding_tokens=True, scale_embedding=False, tie_word_embeddings=False, router_bias=True),
    dict(moe_eval_capacity_token_fraction=0.0, expert_capacity=7), dict(second_expert_policy="random"),
    dict(encoder_sparse_step=0), dict(encoder_sparse_step=1, decoder_sparse_step=1)], ids=str)
def test_nllb_settings_there_and_back(options):
    family, config = to_config({**NLLB, **options})
    assert config.attention.first_position == 6 and config.model.norm == "layer"
    if not options:
        assert config.moe_layers == (1, 3, 6, 9) and config.moe.eval_capacity_factor == 1.0
        assert config.moe.renormalize_after_drops and config.moe.output_dropout == 0.2 and config.moe.fill_order == "choice_major"
    again = to_config({**family.from_config(config, 96), "model_type": "nllb-moe"})[1]
    assert again == config
    shapes = parameter_shapes(config, 96)
    tensors_of(family, config, shapes)  # every parameter has a tensor


@pytest.mark.parametrize("options, words", [
    (dict(decoder_ffn_dim=32), "decoder_ffn_dim=32 is not encoder_ffn_dim"),
    (dict(decoder_attention_heads=4), "decoder_attention_heads=4 is not encoder_attention_heads"),
    (dict(second_expert_policy="sampling"), "second_expert_policy='sampling' draws second experts in evaluation too"),
    (dict(activation_function="tanh"), "activation_function='tanh' is not known here"),
], ids=str)
def test_what_nllb_models_cannot_be_here_is_refused(options, words):
    with pytest.raises(InteropError, match=words):
        to_config({**NLLB, **options})


def test_settings_of_hub_checkpoints_that_say_nothing_new_are_passed_over(caplog):
    to_config({**SWITCH, "feed_forward_proj": "relu", "is_gated_act": False, "router_type": "tokens_masked", "dropout_rate": 0.1,
               "encoder_sparse_step": 2, "initializer_factor": 1.0})
    assert "not known here" not in caplog.text
    with pytest.raises(InteropError, match="is_gated_act=True gives the feed-forward layers a gate"):
        to_config({**SWITCH, "is_gated_act": True})


def test_layers_that_a_family_cannot_name_are_refused_on_the_way_out():
    family, config = to_config(SWITCH)
    moved = resolve({section: {**values, **({"layers": "0,2"} if section == "moe" else {})}
                     for section, values in config.to_dict().items()})
    with pytest.raises(InteropError, match="layers 0, 2 of 4"):
        family.from_config(moved, 96)


def test_input_tables_of_their_own():
    names = {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert own_tables(names, {"tie_word_embeddings": True}) == ({}, {})
    assert own_tables({"shared.weight", "lm_head.weight"}, {"tie_word_embeddings": False}) == ({}, {})
    assert own_tables(names, {"tie_word_embeddings": False}) == ({"model.encoder_embedding": True}, {})
    overrides, renamed = own_tables(names - {"decoder.embed_tokens.weight"}, {"tie_word_embeddings": False})
    assert overrides == {"model.encoder_embedding": True} and renamed == {"shared.weight": "decoder.embed_tokens.weight"}
    family, config = to_config({**SWITCH, "tie_word_embeddings": False}, **overrides)
    _, needed = tensors_of(family, config, parameter_shapes(config, 96))
    assert "encoder.embed_tokens.weight" in needed and "decoder.embed_tokens.weight" in needed and "shared.weight" not in needed


@pytest.mark.parametrize("settings, model", [(SWITCH, ""), (NLLB, "model.")], ids=["switch", "nllb"])
def test_input_tables_of_their_own_and_special_ids_go_back_with_a_checkpoint(settings, model, tmp_path):
    settings = {**settings, "tie_word_embeddings": False, "is_encoder_decoder": True, "decoder_start_token_id": 5, "eos_token_id": 7,
                "pad_token_id": 5}
    family, config = to_config(settings, **{"model.encoder_embedding": True})
    _, needed = tensors_of(family, config, parameter_shapes(config, 96))
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(tensor.shape, np.float32) for name, tensor in needed.items()}
    assert f"{model}encoder.embed_tokens.weight" in tensors
    (tmp_path / "hf").mkdir()
    write_file(tmp_path / "hf" / "model.safetensors", tensors)
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**settings, "torch_dtype": "float32"}))
    made = import_checkpoint(tmp_path / "hf", tmp_path / "run")
    assert made.config.data.vocabulary == "ids:96,begin=5,end=7"
    export_run(tmp_path / "run", tmp_path / "back")
    back = {name: entry.read() for name, entry in read_header(tmp_path / "back" / "model.safetensors").items()}
    assert back.keys() == tensors.keys() and all(np.array_equal(back[name], tensor) for name, tensor in tensors.items())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert [written[name] for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id")] == [5, 7, 5]


def test_losses_of_a_level_router():
    """Switch: balance 1, z (ln E)² each, nothing of the decoder, all of whose layers are mixtures; NLLB: balance 2."""
    _, config = to_config(SWITCH)
    level = {"encoder": jnp.zeros((3, 2, 8, 4)), "decoder": jnp.zeros((4, 2, 5, 4))}
    targets = np.array([[1, 2, 3, -100, -100], [4, 5, 6, 7, 8]])
    logits = jax.random.normal(jax.random.key(0), (2, 5, 96))
    found = switch_losses(config, logits, level, jnp.asarray(targets))
    log_p = np.asarray(jax.nn.log_softmax(logits))
    ce = -np.mean([log_p[row, place, targets[row, place]] for row, place in zip(*np.nonzero(targets >= 0))])
    z = np.log(4) ** 2
    np.testing.assert_allclose([found[name] for name in ("loss_ce", "encoder_aux_loss", "encoder_z_loss", "decoder_aux_loss",
                                                         "decoder_z_loss")], [ce, 1, z, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(found["loss_total"], ce + 0.001 + 0.001 * z, rtol=1e-5)
    _, config = to_config(NLLB)
    found = nllb_losses(config, logits, {"encoder": level["encoder"]}, jnp.asarray(targets))
    np.testing.assert_allclose([found["encoder_aux_loss"], found["loss_total"]], [2, ce + 0.002], rtol=1e-5)
