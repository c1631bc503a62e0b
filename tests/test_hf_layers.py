"""Routing rules and MoE layers of ten published families against what transformers computed (shared/oracles/hf).

From the stored router logits to the stored combine weights, family by family; and one layer of each on weights read here,
by hand, without moe_jax.interop: its input is reconstructed from what the block gave (layer_out - moe_out, normed).
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from flax import nnx

from moe_jax.config import MoEConfig, resolve
from moe_jax.nn.moe import MoELayer, RoutingMode
from moe_jax.routing import ROUTERS, check_router
from moe_jax.routing.assignment import RouterInputs

FOLDER = Path(__file__).parents[2] / "shared" / "oracles" / "hf"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the stored outputs are not here: {FOLDER}")

DTYPES = {"F32": np.float32, "I64": np.int64, "I32": np.int32, "BF16": ml_dtypes.bfloat16,
          "F8_E4M3": ml_dtypes.float8_e4m3fn, "U8": np.uint8}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file: the length of the header, the header in JSON, the bytes."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = {name: entry for name, entry in json.loads(data[8:start]).items() if name != "__metadata__"}
    return {name: np.frombuffer(data[start + entry["data_offsets"][0]:start + entry["data_offsets"][1]],
                                DTYPES[entry["dtype"]]).reshape(entry["shape"]) for name, entry in header.items()}


# The rules, by the words of the section moe; sizes come from the checkpoints.
RULES = {
    "mixtral": dict(gate_order="top_k_then_softmax"),
    "olmoe": dict(),
    "qwen2_moe": dict(num_shared_experts=1, shared_gate=True),
    "qwen3_moe": dict(renormalize=True),
    "deepseek_v1": dict(num_shared_experts=2),
    "deepseek_v2": dict(num_shared_experts=2, num_groups=4, groups_per_token=2, route_scale=4.0),
    "deepseek_v2_lite": dict(num_shared_experts=2),
    "deepseek_v3": dict(num_shared_experts=1, score="sigmoid", renormalize=True, route_scale=2.5, num_groups=4,
                        groups_per_token=2, group_score="top_2_sum"),
    "llama4_text": dict(num_shared_experts=1, score="sigmoid", gate_on="input"),
    "gpt_oss": dict(router_bias=True, expert_bias=True, gate_order="top_k_then_softmax", activation="swiglu_clamped"),
}
# The same rules, whose layers have quantised weights: only their routing is looked at.
QUANTISED = {"deepseek_v3_fp8": RULES["deepseek_v3"], "gpt_oss_mxfp4": RULES["gpt_oss"]}


def moe_config(family: str) -> MoEConfig:
    hub = json.loads((FOLDER / family / "config.hub.json").read_text())
    experts = next(hub[name] for name in ("n_routed_experts", "num_local_experts", "num_experts") if name in hub)
    width = hub.get("moe_intermediate_size", hub["intermediate_size"])
    shared = hub.get("shared_expert_intermediate_size", 0)
    limits = dict(activation_limit=hub["swiglu_limit"], activation_alpha=hub["swiglu_alpha"]) if "swiglu_limit" in hub else {}
    moe = MoEConfig(num_experts=experts, experts_per_token=hub["num_experts_per_tok"], d_ff=width, shared_d_ff=shared,
                    dispatch="dropless", **limits, **(RULES | QUANTISED)[family])
    check_router(moe)
    return moe


def stored_layers(family: str) -> list[tuple[int, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """(index, the oracle's arrays of this MoE layer by kind, its weights by the ends of their names), layer by layer."""
    oracle, model = tensors(FOLDER / family / "oracle.safetensors"), tensors(FOLDER / family / "model.safetensors")
    found = []
    for layer in range(sum(name.startswith("layer_out.") for name in oracle)):
        here = f"model.layers.{layer}"
        arrays = {name.split(".", 1)[0]: array for name, array in oracle.items()
                  if f".{here}." in f"{name}." and not name.startswith("grad")}
        weights = {name.removeprefix(f"{here}."): array for name, array in model.items() if name.startswith(f"{here}.")}
        if "combine" in arrays:
            found.append((layer, arrays, weights))
    return found


def selection_bias(weights, experts: int) -> np.ndarray:
    return next((array for name, array in weights.items() if name.endswith("e_score_correction_bias")),
                np.zeros(experts)).astype(np.float32)


@pytest.mark.parametrize("family", [*RULES, *QUANTISED])
def test_the_router_weighs_experts_as_the_family_does(family):
    moe = moe_config(family)
    layers = stored_layers(family)
    assert layers
    for _, arrays, weights in layers:
        logits_TE = arrays["router_logits"].astype(np.float32)
        inputs = RouterInputs(jnp.asarray(logits_TE), jnp.ones(len(logits_TE), bool),
                              jnp.asarray(selection_bias(weights, moe.num_experts)))
        routing = jax.device_get(ROUTERS["top_k"].route(inputs, moe))
        combine_TE = np.zeros(logits_TE.shape, np.float32)
        np.add.at(combine_TE, (routing.token_N, routing.expert_N), routing.gate_N)
        np.testing.assert_array_equal(combine_TE != 0, arrays["combine"] != 0)
        np.testing.assert_allclose(combine_TE, arrays["combine"], rtol=1e-5, atol=1e-6)


def our_weights(moe: MoEConfig, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The layer's parameters by our names, of theirs."""
    weights = {name.split(".", 1)[1]: array.astype(np.float32) for name, array in weights.items()
               if name.startswith(("mlp.", "feed_forward.", "block_sparse_moe."))}
    ours = {"w_router_DE": weights[next(n for n in ("gate.weight", "router.weight") if n in weights)].T}
    if moe.router_bias:
        ours["b_router_E"] = weights["router.bias"]
    if moe.shared_gate:
        ours["w_shared_gate_D"] = weights["shared_expert_gate.weight"][0]
    for branch, theirs in (("gate", "gate_proj"), ("in", "up_proj"), ("out", "down_proj")):
        letters = "FD" if branch == "out" else "DF"
        if moe.num_shared_experts:
            name = next(n for n in weights if n.startswith("shared_expert") and theirs in n)
            ours[f"shared.w_{branch}_{letters}"] = weights[name].T
        if "experts.gate_up_proj" not in weights:
            mixtral = {"gate": "w1", "in": "w3", "out": "w2"}[branch]
            name = "experts.{}.%s.weight" % (theirs if f"experts.0.{theirs}.weight" in weights else mixtral)
            ours[f"experts.w_{branch}_E{letters}"] = np.stack([weights[name.format(e)].T for e in range(moe.num_experts)])
    if "experts.gate_up_proj" in weights:
        fused, halves = weights["experts.gate_up_proj"], moe.d_ff
        take = {"gate": np.s_[..., ::2], "in": np.s_[..., 1::2]} if moe.expert_bias else {
            "gate": np.s_[..., :halves], "in": np.s_[..., halves:]}
        ours |= {f"experts.w_{branch}_EDF": fused[place] for branch, place in take.items()}
        ours["experts.w_out_EFD"] = weights["experts.down_proj"]
        if moe.expert_bias:
            ours |= {f"experts.b_{branch}_EF": weights["experts.gate_up_proj_bias"][place] for branch, place in take.items()}
            ours["experts.b_out_ED"] = weights["experts.down_proj_bias"]
    return ours


def layer_input(arrays, weights, epsilon: float) -> np.ndarray:
    """x = norm(h), where the block gave h + moe(x)."""
    out_BSD = arrays["layer_out"].astype(np.float64)
    h_BSD = out_BSD - arrays["moe_out"].reshape(out_BSD.shape)
    normed_BSD = h_BSD / np.sqrt(np.mean(h_BSD**2, axis=-1, keepdims=True) + epsilon)
    return (normed_BSD * weights["post_attention_layernorm.weight"].astype(np.float64)).astype(np.float32)


@pytest.mark.parametrize("family", RULES)
def test_the_layer_gives_what_the_familys_does(family):
    moe = moe_config(family)
    _, arrays, weights = stored_layers(family)[-1]
    x_BSD = layer_input(arrays, weights, json.loads((FOLDER / family / "config.hub.json").read_text())["rms_norm_eps"])
    settings = {name: getattr(moe, name) for name in MoEConfig.__dataclass_fields__}
    config = resolve({"model": {"d_model": x_BSD.shape[-1]}, "moe": settings, "data": {"sequence_length": x_BSD.shape[1]}})
    with jax.set_mesh(tiny.ONE):
        graph, state = nnx.split(MoELayer(config, nnx.Rngs(params=0)))
        flat, ours = tiny.leaves(state.to_pure_dict()), our_weights(moe, weights)
        assert {name: array.shape for name, array in flat.items()} == {name: array.shape for name, array in ours.items()}
        tree = jax.tree_util.tree_map_with_path(lambda path, _: ours[".".join(key.key for key in path)], state.to_pure_dict())
        run = jax.jit(lambda tree, x, bias_E: nnx.merge(graph, tree)(x, jnp.ones(x.shape[:2], bool), RoutingMode.dropless(),
                                                                     bias_E), compiler_options=tiny.QUICK)
        y_BSD, _ = run(tree, x_BSD, selection_bias(weights, moe.num_experts))
    np.testing.assert_allclose(y_BSD, arrays["moe_out"].reshape(x_BSD.shape), rtol=1e-4, atol=5e-5)
