"""Routing rules of ten published families against what transformers computed (shared/oracles/hf): from the stored router logits
to the stored combine weights, without moe_jax.interop. Layers and whole models: test_verify.py."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.config import MoEConfig
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
