"""OpenMoE's parts and a whole tiny OpenMoE equal OpenMoE's own code, case by case (its README: beside the files)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny
from flax import nnx

from moe_jax.config import Config, ModelConfig, resolve
from moe_jax.dispatch.products import BatchedProducts
from moe_jax.models.decoder import Decoder, text_positions
from moe_jax.nn.attention import Attention
from moe_jax.nn.experts import Experts
from moe_jax.nn.mlp import MLP
from moe_jax.nn.moe import RoutingMode
from moe_jax.nn.norms import RMSNorm
from moe_jax.nn.positions import rotate
from moe_jax.routing import has_fixed_choices
from moe_jax.routing.assignment import assign_slots
from moe_jax.routing.balance import balance_loss, router_z_loss
from moe_jax.routing.usage import kept_gate, slots_used, tokens_left_behind
from moe_jax.training.losses import cross_entropy
from moe_jax.training.state import initial_params
from moe_jax.training.step import Totals, forward, loss_fn, routing_losses

MODEL = oracles.arrays("openmoe_tiny_lm")


def halves(wi_0):
    """flaxformer's wi_0 of width 2F: the linear half first, then the half under the swish."""
    return np.split(wi_0, 2, axis=-1)


# Parts


def ffn(case):
    linear, gate = halves(case["wi_0"])
    weights = {"w_linear_DF": linear, "w_gate_DF": gate, "w_in_DF": case["wi_1"], "w_out_FD": case["wo"]}
    width, hidden = case["wi_1"].shape
    with jax.set_mesh(tiny.ONE):
        mlp = MLP(width, hidden, "swiglu_linear", 1.0, nnx.Rngs(params=0))
        for name, weight in weights.items():
            getattr(mlp, name)[...] = jnp.asarray(weight)
        y_BSD = jax.jit(lambda x: mlp(x))(case["inputs"])
    np.testing.assert_allclose(y_BSD, case["outputs"], rtol=1e-5, atol=1e-6)
    # As an expert among others, on the sequences as its rows.
    experts = Experts(2, width, hidden, "swiglu_linear", 1.0, nnx.Rngs(params=0))
    stacked = {name[:-2] + "E" + name[-2:]: np.stack([weight, weight]) for name, weight in weights.items()}
    y_ETD = experts.function(BatchedProducts(), jax.tree.map(jnp.asarray, stacked), case["inputs"])
    np.testing.assert_allclose(y_ETD, case["outputs"], rtol=1e-5, atol=1e-6)


def attention(case):
    """Without the division by the root of the head width."""
    batch, length, width = case["inputs"].shape
    head = case.other("rope")["q"].shape[-1]
    heads = case["query"].shape[1] // head
    config = ModelConfig(d_model=width, num_heads=heads, num_kv_heads=heads, head_dim=head, scaled_attention=False)
    with jax.set_mesh(tiny.ONE):
        module = Attention(config, nnx.Rngs(params=0))
        for name in ("query", "key", "value"):
            getattr(module, f"w_{name}_DHd")[...] = jnp.asarray(case[name]).reshape(width, heads, head)
        module.w_out_HdD[...] = jnp.asarray(case["out"]).reshape(heads, head, width)
        positions_BS = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
        y_BSD = jax.jit(lambda x: module(x, positions_BS, case["mask"][:, 0] > 0)[0])(case["inputs"])
    # All positions: upstream too gives a query that sees nothing the mean of all values.
    np.testing.assert_allclose(y_BSD, case["outputs"], rtol=1e-5, atol=1e-6)
    real_BS, causal_ST = case["target_tokens"] > 0, np.tril(np.ones((length, length)))
    np.testing.assert_array_equal(case["mask"][:, 0], real_BS[:, :, None] * real_BS[:, None, :] * causal_ST)


def rmsnorm(case):
    norm = RMSNorm(case["scale"].shape[0], 1e-6)
    norm.scale_D[...] = jnp.asarray(case["scale"])
    np.testing.assert_allclose(norm(jnp.asarray(case["inputs"])), case["outputs"], rtol=1e-5)


def rope(case):
    batch, length = case["q"].shape[:2]
    positions_BS = jnp.broadcast_to(jnp.arange(length), (batch, length))
    for name in ("q", "k"):
        turned = rotate(jnp.asarray(case[name]), positions_BS, 10_000.0)
        np.testing.assert_allclose(turned, case[f"{name}_rotated"], rtol=1e-5, atol=1e-6)
    # The tables, by turning (1, 0) and (0, 1): cos and sin, and their negatives.
    half = case["sin"].shape[1] // 2
    first = jnp.concatenate([jnp.ones(half), jnp.zeros(half)])
    table = rotate(jnp.broadcast_to(first, (1, length, 1, 2 * half)), positions_BS[:1], 10_000.0)[0, :, 0]
    np.testing.assert_allclose(table, np.concatenate([case["cos"][:, :half], case["sin"][:, half:]], 1), atol=1e-6)


@pytest.mark.parametrize("case", oracles.cases("openmoe_parts"), ids=str)
def test_part(case):
    {"ffn": ffn, "attention": attention, "rmsnorm": rmsnorm, "rope": rope}[case.name](case)
    case.all_compared()


def test_unscaled_queries_start_smaller_by_what_the_scores_are_not_divided_by():
    wide = dict(d_model=256, num_heads=8, num_kv_heads=2, head_dim=16)
    plain, unscaled = (Attention(ModelConfig(**wide, scaled_attention=scaled), nnx.Rngs(params=0))
                       for scaled in (True, False))
    np.testing.assert_allclose(unscaled.w_query_DHd[...], plain.w_query_DHd[...] / 4, rtol=1e-6)
    np.testing.assert_array_equal(unscaled.w_key_DHd[...], plain.w_key_DHd[...])


# The language model


@functools.lru_cache(maxsize=None)
def config() -> Config:
    given, (batch, length) = json.loads(str(MODEL["model/config"])), MODEL["batch/target_tokens"].shape
    # flaxformer makes at least as many groups as experts.
    groups = max(batch * length // given["max_group_size"], given["experts"])
    every = given["layers"] // given["sparse_layers"]
    return resolve({
        "model": dict(num_layers=given["layers"], d_model=given["d_model"], num_heads=given["heads"],
                      num_kv_heads=given["heads"], head_dim=given["head_dim"], d_ff=given["d_ff"],
                      activation="swiglu_linear", scaled_attention=False),
        "moe": dict(num_experts=given["experts"], experts_per_token=given["top_k"], every=every, d_ff=given["d_ff"],
                    activation="swiglu_linear", residual_ffn="sequential", padding="routed", fill_order="choice_major",
                    allow_noncausal_routing=True, capacity_counts="tokens", min_capacity=given["min_expert_capacity"],
                    capacity_factor=given["train_capacity_factor"], eval_dispatch="gather",
                    eval_capacity_factor=given["eval_capacity_factor"], group_size=batch * length // groups,
                    balance_loss="st_moe", balance_weight=given["aux_loss_factor"],
                    router_z_weight=given["router_z_loss_factor"]),
        "data": dict(sequence_length=length, batch_size=batch),
        "training": dict(output_z_weight=given["z_loss"]),
    })


def vocabulary():
    return json.loads(str(MODEL["model/config"]))["vocab"]


# Our path inside a layer, and flaxformer's, by flax's name; wi_0 is two of our matrices.
NORMS = {"attention_norm": "pre_self_attention_layer_norm", "ffn_norm": "pre_mlp_layer_norm",
         "residual_norm": "pre_extra_mlp_layer_norm"}
NETWORKS = {"mlp": "mlp", "residual": "extra_mlp", "experts": "mlp/expert"}


def layer_arrays(prefix, layer, names):
    """One layer's arrays under ``prefix``, as our tree ``names`` has them."""
    heads, head = config().model.num_heads, config().model.head_dim
    get = lambda name: MODEL[f"{prefix}decoder/layers_{layer}/{name}"]

    def network(theirs, ours):
        linear, gate = halves(get(f"{theirs}/wi_0/kernel"))
        arrays = {"linear": linear, "gate": gate, "in": get(f"{theirs}/wi_1/kernel"), "out": get(f"{theirs}/wo/kernel")}
        return {name: arrays[name.split("_")[1]] for name in ours}

    tree = {}
    for name, ours in names.items():
        if name in NORMS:
            tree[name] = {"scale_D": get(f"{NORMS[name]}/scale")}
        elif name == "attention":
            shapes = {part: (-1, heads, head) for part in ("query", "key", "value")} | {"out": (heads, head, -1)}
            tree[name] = {key: get(f"self_attention/{key.split('_')[1]}/kernel").reshape(shapes[key.split("_")[1]])
                          for key in ours}
        elif name == "moe":
            tree[name] = {"w_router_DE": get("mlp/router/router_weights/w/kernel"),
                          "experts": network("mlp/expert", ours["experts"])}
        else:
            tree[name] = network(NETWORKS[name], ours)
    return tree


def arrays(prefix):
    """Upstream's parameters or gradients in our tree: layers scanned together are stacked."""
    shapes = jax.eval_shape(lambda: initial_params(config(), vocabulary(), jax.random.key(0)))
    first, period, repeats = jax.eval_shape(lambda: Decoder(config(), vocabulary(), nnx.Rngs(params=0))).pattern
    assert first == 0 and period * repeats == config().model.num_layers and not shapes.get("last")
    layers = {}
    for i in range(period):
        each = [layer_arrays(prefix, r * period + i, shapes["body"]["layers"][i]) for r in range(repeats)]
        layers[i] = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    tree = {"embedding": {"embedding_VD": MODEL[f"{prefix}token_embedder/embedding"],
                          "w_logits_DV": MODEL[f"{prefix}decoder/logits_dense/kernel"]},
            "body": {"layers": layers}, "final_norm": {"scale_D": MODEL[f"{prefix}decoder/decoder_norm/scale"]}}
    assert jax.tree.map(np.shape, tree) == jax.tree.map(lambda leaf: leaf.shape, {k: shapes[k] for k in tree})
    assert not jax.tree.leaves({k: v for k, v in shapes.items() if k not in tree})
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == sum(
        MODEL[key].size for key in MODEL if key.startswith(prefix))
    return tree


def batch(name):
    target_BS = MODEL[f"{name}/target_tokens"]
    valid_BS = target_BS > 0
    return {"input_ids": MODEL[f"{name}/input_tokens"], "target_ids": target_BS, "valid": valid_BS,
            "segment_ids": MODEL.get(f"{name}/segment_ids", valid_BS.astype(np.int32)),
            # The index in the row, also where documents are packed.
            "positions": np.tile(np.arange(target_BS.shape[1], dtype=np.int32), (len(target_BS), 1))}


MODES = {"train": RoutingMode.training, "eval": RoutingMode.evaluation}
RUNS = oracles.cases("openmoe_tiny_lm", "logits")
# Read by every test here: settings, parameters, batches.
INPUTS = [oracles.cases("openmoe_tiny_lm", array) for array in ("config", "token_embedder/embedding", "target_tokens")]
MASKS = oracles.cases("openmoe_tiny_lm", "dispatch_mask")
each_run = pytest.mark.parametrize("run", RUNS, ids=str)


@functools.lru_cache(maxsize=None)
def outputs(run: str):
    name, mode = run.split(".")
    with jax.set_mesh(tiny.ONE):
        return jax.device_get(jax.jit(lambda params, batch: forward(
            config(), vocabulary(), params, batch, MODES[mode](config(), record=True), tiny.no_bias(config())))(
                arrays("params/"), batch(name)))


@each_run
def test_logits_of_every_position_padding_included(run):
    np.testing.assert_allclose(outputs(run.name).logits_BSV, run["logits"], rtol=1e-4, atol=1e-5)


@each_run
def test_losses(run):
    output = outputs(run.name)
    given, values = config(), batch(run.name.split(".")[0])
    target_count = values["valid"].sum()
    ce_BS, log_z_BS = cross_entropy(output.logits_BSV, values["target_ids"])
    z_loss = given.training.output_z_weight * np.sum(log_z_BS**2 * values["valid"]) / target_count
    ce = np.sum(ce_BS * values["valid"]) / target_count
    # Every position is routed, padding as well.
    balance, router_z = routing_losses(given, output.statistics, jnp.float32(values["valid"].size))
    total = ce + z_loss + given.moe.balance_weight * balance + given.moe.router_z_weight * router_z
    for value, wanted in ((z_loss, "z_loss"), (ce + z_loss, "cross_entropy_plus_z"), (total, "total_loss")):
        np.testing.assert_allclose(value, run[wanted], rtol=1e-5, err_msg=wanted)
    np.testing.assert_allclose(balance, np.mean(run["auxiliary_loss"]), rtol=1e-5)
    np.testing.assert_allclose(router_z, np.mean(run["router_z_loss"]), rtol=1e-5)


@each_run
def test_what_each_layer_reports(run):
    statistics, moe = outputs(run.name).statistics, config().moe
    groups, tokens = statistics.kept_GN.shape[1], batch(run.name.split(".")[0])["valid"].size
    factor = moe.capacity_factor if run.name.endswith("train") else moe.eval_capacity_factor
    capacity = max(round(factor * tokens / groups / moe.num_experts), moe.min_capacity)
    for layer in range(len(config().moe_layers)):
        routing_G, kept_GN = jax.tree.map(lambda leaf: leaf[layer], (statistics.routing_G, statistics.kept_GN))
        total = jnp.float32(tokens)
        router = jax.tree.map(lambda leaf: leaf[layer], statistics.router)
        found = {"auxiliary_loss": balance_loss(router, moe, total), "router_z_loss": router_z_loss(router, total),
                 "fraction_tokens_left_behind": tokens_left_behind(routing_G, kept_GN, tokens // groups),
                 "router_confidence": kept_gate(routing_G, kept_GN),
                 "expert_usage": slots_used(kept_GN, moe.num_experts, capacity)}
        for name, value in found.items():
            np.testing.assert_allclose(value, run[name][layer], rtol=1e-5, atol=1e-6, err_msg=name)
    run.all_compared("logits", "total_loss", "cross_entropy_plus_z", "z_loss")


@pytest.mark.parametrize("case", MASKS, ids=str)
def test_who_gets_which_slot(case):
    run, layer = case.name.rsplit(".moe", 1)
    routing_G, kept_GN = jax.tree.map(lambda leaf: leaf[int(layer)], (
        outputs(run).statistics.routing_G, outputs(run).statistics.kept_GN))
    groups, _, num_experts, capacity = case["dispatch_mask"].shape
    mask_GTEC = np.zeros(case["dispatch_mask"].shape, bool)
    for g in range(groups):
        slot_N, fits_N = assign_slots(routing_G.expert_N[g], num_experts, capacity)
        np.testing.assert_array_equal(fits_N, kept_GN[g])
        for n in np.flatnonzero(fits_N):
            mask_GTEC[g, routing_G.token_N[g, n], routing_G.expert_N[g, n], slot_N[n]] = True
    np.testing.assert_array_equal(mask_GTEC, case["dispatch_mask"])
    case.all_compared()


@pytest.mark.parametrize("case", oracles.cases("openmoe_tiny_lm", "d/token_embedder/embedding"), ids=str)
def test_gradients_of_the_training_loss(case):
    name, mode = case.name.removeprefix("grads_").rsplit("_", 1)
    values, given = batch(name), config()
    assert mode == "train"
    tokens, no_bias = jnp.float32(values["valid"].sum()), tiny.no_bias(given)
    with jax.set_mesh(tiny.ONE):
        gradients, total = jax.device_get(jax.jit(lambda params: jax.value_and_grad(loss_fn, has_aux=True)(
            params, given, vocabulary(), values, no_bias, jax.random.key(0), Totals(tokens, tokens))[::-1])(arrays("params/")))
    np.testing.assert_allclose(total[0], MODEL[f"{name}.{mode}/total_loss"], rtol=1e-5)
    tiny.assert_close(gradients, arrays(f"{case.name}/d/"), rtol=1e-4, atol=1e-6)  # `arrays` sees that none is left out


# Padding that is routed


def test_openmoe_blanks_positions_between_texts():
    ids_BS = np.array([[0, 5, 6, 0, 0, 0],  # the end of the text feeds its last id; behind it nothing
                       [0, 7, 0, 8, 0, 0],  # a second text starts with 0 and is told by the id after it
                       [0, 0, 0, 0, 0, 0]])  # the first place always counts
    nothing_BS = np.zeros(ids_BS.shape, bool)
    wanted = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(text_positions(jnp.asarray(ids_BS), nothing_BS), wanted)
    # One token at a time the next id is not known: what is valid is never blanked.
    valid_BS = ids_BS[:, -1:] == 0
    np.testing.assert_array_equal(text_positions(jnp.asarray(ids_BS[:, -1:]), valid_BS), valid_BS)


def test_routed_padding_takes_slots_and_is_counted_where_text_alone_is_otherwise():
    settings = dict(model_num_layers=1, moe_every=1, moe_capacity_factor=0.5)
    routed, nowhere = (tiny.config(**settings, moe_padding=padding) for padding in ("routed", "nowhere"))
    params, full, half = tiny.params(nowhere), tiny.batch(2), tiny.batch(2, lengths=[16, 8])
    tight = RoutingMode("gather", 0.5, record=True)
    one, other = (tiny.output(config, params, full, tight) for config in (routed, nowhere))
    np.testing.assert_array_equal(one.logits_BSV, other.logits_BSV)
    one, other = (tiny.output(config, params, half, tight).statistics for config in (routed, nowhere))
    np.testing.assert_array_equal(one.router.tokens[0], [16, 16])
    np.testing.assert_array_equal(other.router.tokens[0], [16, 8])
    # Half of 2 · 16 / 4 are 4 slots. Rows of zeros score all experts alike and choose the first two.
    padding_N = half["valid"][1][one.routing_G.token_N[0, 1]] == 0
    np.testing.assert_array_equal(np.unique(one.routing_G.expert_N[0, 1][padding_N]), [0, 1])
    assert (other.routing_G.expert_N[0, 1][padding_N] == 4).all()
    assert not has_fixed_choices(routed.moe) and has_fixed_choices(nowhere.moe)
