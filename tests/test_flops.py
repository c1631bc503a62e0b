"""Parameters and FLOPs against numbers worked out by hand."""

import pytest
import tiny

from moe_jax.training.flops import (
    count_parameters, expert_parameters, forward_flops_per_token, hardware_flops_per_token, training_flops_per_token)

# D=16, 4 query heads and 2 key/value heads of width 4, dense F=32, expert F=16, E=4, K=2, V=32, S=16.
ATTENTION = 16 * 4 * 4 + 2 * 16 * 2 * 4 + 4 * 4 * 16  # query, key and value, out = 256 + 256 + 256
NORMS = 2 * 16
MLP = 3 * 16 * 32  # SwiGLU: three matrices = 1536
EXPERT = 3 * 16 * 16  # 768
ROUTER = 16 * 4
TABLES = 2 * 32 * 16  # embedding and output layer = 1024


def test_parameters_of_a_dense_model_by_hand():
    count = count_parameters(tiny.config(moe_num_experts=0), 32)
    assert count.total == 4 * (ATTENTION + NORMS + MLP) + 16 + TABLES == 10_384
    assert count.active == count.total and count.embedding == 1024


def test_parameters_of_a_moe_model_by_hand():
    count = count_parameters(tiny.config(), 32)  # two of four layers have 4 experts
    dense = 4 * (ATTENTION + NORMS) + 2 * MLP + 16 + TABLES
    assert count.total == dense + 2 * (4 * EXPERT + ROUTER)
    assert count.active == dense + 2 * (2 * EXPERT + ROUTER)


def test_multi_token_prediction_is_counted_in_training_alone():
    plain, further = tiny.config(), tiny.config(model_mtp_depth=2)
    count, without = count_parameters(further, 32), count_parameters(plain, 32)
    # Two norms and the block's own two, M, the last norm, and a layer of 4 experts.
    depth = 2 * 16 + NORMS + 2 * 16 * 16 + 16 + ATTENTION + 4 * EXPERT + ROUTER
    assert count.total == without.total + 2 * depth
    assert count.active == without.active
    assert forward_flops_per_token(further, 32, 16) == forward_flops_per_token(plain, 32, 16)
    layer = LAYER_FLOPS + 2 * (2 * EXPERT + ROUTER)
    assert training_flops_per_token(further, 32) == training_flops_per_token(plain, 32) + 3 * 2 * (layer + 1024 + 2 * 512)


def test_a_tied_table_is_counted_once():
    assert count_parameters(tiny.config(model_tie_embedding=True), 32).embedding == 512


def test_shared_experts_and_plain_activations_are_counted():
    plain = tiny.config(moe_activation="gelu", moe_num_shared_experts=1)
    assert expert_parameters(plain) == 2 * 16 * 16
    count, without = count_parameters(plain, 32), count_parameters(tiny.config(moe_activation="gelu"), 32)
    assert count.total - without.total == count.active - without.active == 2 * 2 * 16 * 16


def test_a_shared_expert_of_its_own_width_its_gate_and_a_routers_bias_are_counted():
    options = tiny.config(moe_num_shared_experts=2, moe_shared_d_ff=24, moe_shared_gate=True, moe_router_bias=True)
    count, without = count_parameters(options, 32), count_parameters(tiny.config(), 32)
    shared = 3 * 16 * 2 * 24
    assert count.total - without.total == count.active - without.active == 2 * (shared + 16 + 4)
    more = forward_flops_per_token(options, 32, 16) - forward_flops_per_token(tiny.config(), 32, 16)
    assert more == 2 * 2 * (shared + 16)


def test_moe_layers_named_one_by_one_are_counted():
    count = count_parameters(tiny.config(moe_layers="0,1,3"), 32)
    dense = 4 * (ATTENTION + NORMS) + MLP + 16 + TABLES
    assert (count.total, count.active) == (dense + 3 * (4 * EXPERT + ROUTER), dense + 3 * (2 * EXPERT + ROUTER))


@pytest.mark.parametrize("activation, matrices", [("relu_squared", 2), ("gelu_exact", 2), ("swiglu_clamped", 3),
                                                  ("swiglu_linear", 4)])
def test_an_activation_has_its_own_number_of_matrices(activation, matrices):
    config = tiny.config(moe_activation=activation, model_activation=activation)
    assert expert_parameters(config) == matrices * 16 * 16
    mlp, expert = matrices * 16 * 32, matrices * 16 * 16
    assert count_parameters(config, 32).total == 4 * (ATTENTION + NORMS) + 2 * mlp + 16 + TABLES + 2 * (4 * expert + ROUTER)
    assert forward_flops_per_token(config, 32, 16) == 4 * LAYER_FLOPS + 2 * 2 * mlp + 2 * 2 * (2 * expert + ROUTER) + 1024


def test_dense_layers_in_front_have_the_dense_width():
    config = tiny.config(moe_every=1, moe_first_dense_layers=1)  # one MLP, three layers of 4 experts
    count, dense = count_parameters(config, 32), 4 * (ATTENTION + NORMS) + MLP + 16 + TABLES
    assert count.total == dense + 3 * (4 * EXPERT + ROUTER) and count.active == dense + 3 * (2 * EXPERT + ROUTER)
    assert forward_flops_per_token(config, 32, 16) == 4 * LAYER_FLOPS + 2 * MLP + 3 * 2 * (2 * EXPERT + ROUTER) + 1024


def test_biases_are_parameters_and_no_flops():
    biased, plain = (tiny.config(moe_expert_bias=bias, moe_num_shared_experts=1) for bias in (True, False))
    each = 2 * 16 + 16  # gate and in: F = 16 each; out: D = 16
    assert expert_parameters(biased) == EXPERT + each
    more = [getattr(count_parameters(biased, 32), name) - getattr(count_parameters(plain, 32), name)
            for name in ("total", "active")]
    assert more == [2 * (4 + 1) * each, 2 * (2 + 1) * each]  # per layer 4 experts, 2 of them active, and the shared one
    for flops in (training_flops_per_token, hardware_flops_per_token):
        assert flops(biased, 32) == flops(plain, 32)


@pytest.mark.parametrize("residual, norms", [("parallel", 0), ("sequential", 16)])
def test_a_residual_ffn_is_active_for_every_token(residual, norms):
    with_it, without = tiny.config(moe_residual_ffn=residual), tiny.config()
    counts = [count_parameters(config, 32) for config in (with_it, without)]
    assert counts[0].total - counts[1].total == counts[0].active - counts[1].active == 2 * (MLP + norms)
    more = forward_flops_per_token(with_it, 32, 16) - forward_flops_per_token(without, 32, 16)
    assert more == 2 * 2 * MLP
    more = hardware_flops_per_token(with_it, 32) - hardware_flops_per_token(without, 32)
    assert more == 3 * 2 * 2 * MLP


def test_experts_that_take_factor_times_t_over_e_tokens_compute_so_many():
    choice = dict(moe_router="expert_choice", moe_balance_weight=0.0, moe_group_over="batch", moe_dispatch="dropless")
    by_factor = tiny.config(**choice, moe_capacity_counts="tokens", moe_capacity_factor=1.5)
    by_mean = tiny.config(**choice)
    less = forward_flops_per_token(by_mean, 32, 16) - forward_flops_per_token(by_factor, 32, 16)
    assert less == 2 * 2 * (2 - 1.5) * EXPERT


# Two operations per multiply-add; attention over half of S = 16 on average: scores and values 2 · 2 · 4 · 4 · 8 = 512.
LAYER_FLOPS = 2 * ATTENTION + 512


def test_forward_flops_of_a_dense_model_by_hand():
    # Four layers and the output layer 2 · 16 · 32; norms and the look-up are left out.
    assert forward_flops_per_token(tiny.config(moe_num_experts=0), 32, 16) == 4 * (LAYER_FLOPS + 2 * MLP) + 1024


def test_forward_flops_of_a_moe_model_by_hand():
    expected = 4 * LAYER_FLOPS + 2 * 2 * MLP + 2 * 2 * (2 * EXPERT + ROUTER) + 1024
    assert forward_flops_per_token(tiny.config(), 32, 16) == expected


def test_shared_experts_are_active_for_every_token():
    more = forward_flops_per_token(tiny.config(moe_num_shared_experts=1), 32, 16)
    assert more - forward_flops_per_token(tiny.config(), 32, 16) == 2 * 2 * EXPERT


def test_training_is_three_forward_passes():
    config = tiny.config()
    assert training_flops_per_token(config, 32) == 3 * forward_flops_per_token(config, 32, 16)


def test_b56_twice_the_experts_cost_the_router_only():
    few, many = (forward_flops_per_token(tiny.config(moe_num_experts=e), 32, 16) for e in (4, 8))
    assert many - few == 2 * 2 * ROUTER  # two layers, 2 operations, 4 more columns of 16
    active = [count_parameters(tiny.config(moe_num_experts=e), 32).active for e in (4, 8)]
    assert active[1] - active[0] == 2 * ROUTER


@pytest.mark.parametrize("settings, slots_per_token", [
    (dict(moe_dispatch="dropless"), 2),
    (dict(moe_dispatch="reference"), 4),  # every expert on every token
    (dict(moe_capacity_factor=1.0), 2),  # 8 slots for 16 tokens in each of 4 buffers
    (dict(moe_capacity_factor=1.5), 3),
    (dict(moe_capacity_factor=1.0, moe_capacity_counts="tokens"), 1),  # OpenMoE: K is not in the capacity
    (dict(moe_capacity_factor=1.0, moe_group_size=2, moe_min_capacity=2), 4),  # 2 slots for 2 tokens in 4 buffers
    (dict(moe_router="expert_choice", moe_balance_weight=0.0, moe_group_over="batch"), 2),
])
def test_hardware_flops_count_every_slot_filled_or_not(settings, slots_per_token):
    config = tiny.config(**settings)
    extra = hardware_flops_per_token(config, 32) - training_flops_per_token(config, 32)
    assert extra == 3 * 2 * 2 * (slots_per_token - 2) * EXPERT


def test_hardware_flops_of_a_dense_model_are_its_model_flops():
    config = tiny.config(moe_num_experts=0)
    assert hardware_flops_per_token(config, 32) == training_flops_per_token(config, 32)


def test_windows_and_chunks_are_counted_by_what_they_see():
    full = tiny.config(moe_num_experts=0)
    limited = tiny.config(moe_num_experts=0, attention_layers="sliding,chunked", attention_window=4, attention_chunk=6)
    # Of 16 tokens: windows of 4 but for the first, 4 - 4²/32; chunks of 6, 6 and 4, (36 + 36 + 16) / 32. Full: 8.
    less = 2 * (8 - 3.5) + 2 * (8 - 2.75)
    assert forward_flops_per_token(full, 32, 16) - forward_flops_per_token(limited, 32, 16) == 2 * 2 * 4 * 4 * less
    # The last token: all 16, a window, and the 4 of its chunk.
    more = [forward_flops_per_token(config, 32, 16, last=True) - 4 * 2 * (ATTENTION + MLP) - 1024 for config in (full, limited)]
    assert more == [4 * 2 * 2 * 4 * 4 * 16, 2 * 2 * 2 * 4 * 4 * (4 + 4)]


def test_latent_attention_by_hand():
    config = tiny.config(moe_num_experts=0, model_num_kv_heads=4, model_head_dim=10, attention_kind="latent",
                         attention_query_rank=8, attention_latent_rank=6, attention_rope_dim=4, attention_value_dim=8)
    matrices = 16 * 8 + 8 * 4 * 10 + 16 * (6 + 4) + 6 * 4 * (6 + 8) + 4 * 8 * 16
    assert count_parameters(config, 32).total == 4 * (matrices + 8 + 6 + NORMS + MLP) + 16 + TABLES
    weights = 4 * 2 * (matrices + MLP) + 1024
    assert forward_flops_per_token(config, 32, 16) == weights + 4 * 2 * 4 * (10 + 8) * 8
    # A single token reads latents of 6 and keys of 4, twice the latents: for scores and for values.
    assert forward_flops_per_token(config, 32, 16, last=True) == weights + 4 * 2 * 4 * (6 + 4 + 6) * 16
