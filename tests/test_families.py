"""The table of families: every published size counted by hand and against its authors' figures, nothing allocated."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax import families
from moe_jax.config import Config, ConfigError, load_config
from moe_jax.interop import huggingface
from moe_jax.planning.slices import parse_slice
from moe_jax.training.flops import ParameterCount, count_parameters

ROOT = Path(__file__).parents[1]
MATRICES = {"relu": 2, "gelu": 2, "swiglu": 3, "geglu": 3, "swiglu_clamped": 3, "swiglu_linear": 4}
ROWS = [(family, size) for family, row in families.FAMILIES.items() for size in [*row.presets, "tiny"]]


def network(activation: str, width: int, hidden: int, bias: bool) -> int:
    """A feed-forward network: its matrices, and a bias behind each product."""
    return MATRICES[activation] * width * hidden + ((MATRICES[activation] - 1) * hidden + width if bias else 0)


def attention_by_hand(config: Config) -> int:
    """One attention, of a layer or across."""
    model, options = config.model, config.attention
    width, heads, kv_heads, head = model.d_model, model.num_heads, model.num_kv_heads, model.head_dim
    if options.kind == "latent":
        rank, rope, value = options.latent_rank, options.rope_dim, options.value_dim
        query = (width * options.query_rank + options.query_rank + options.query_rank * heads * head if options.query_rank
                 else width * heads * head)
        return query + width * (rank + rope) + rank + rank * heads * (head - rope + value) + heads * value * width
    biases = {"none": 0, "qkv": (heads + 2 * kv_heads) * head, "all": (heads + 2 * kv_heads) * head + width}[options.bias]
    norms = {"none": 0, "unscaled": 0, "head": 2 * head, "all_heads": (heads + kv_heads) * head}[options.qk_norm]
    return 2 * width * head * (heads + kv_heads) + biases + norms + (heads if options.sinks else 0)


def by_hand(config: Config) -> tuple[int, int]:
    """(total, active) of a model without multi-token prediction."""
    model, moe, width = config.model, config.moe, config.model.d_model
    norm = 2 * width if model.norm == "layer" else width
    expert = network(moe.activation, width, moe.d_ff, moe.expert_bias)
    routers = width * moe.num_experts * (2 if moe.router in ("noisy_top_k", "hierarchical") else 1)
    routers += 2 * width * moe.num_groups if moe.router == "hierarchical" else 0
    mixture = routers + moe.num_experts * expert + (moe.num_experts if moe.router_bias else 0)
    if moe.num_shared_experts:
        shared = moe.num_shared_experts * (moe.shared_d_ff or moe.d_ff)
        mixture += network(moe.activation, width, shared, moe.expert_bias) + (width if moe.shared_gate else 0)
    chosen = moe.capacity_factor if moe.router == "expert_choice" else moe.experts_per_token
    tables = (1 if model.tie_embedding else 2) * model.vocab_size * width
    mixtures = len(config.moe_layers)
    if model.architecture == "lstm":
        # Four gates of what comes in and of the state before, and a bias each.
        total = tables + model.num_layers * (4 * 2 * width * width + 4 * width) + mixtures * mixture
        return total, round(total - mixtures * (moe.num_experts - chosen) * expert)
    dense = network(model.activation, width, model.d_ff, model.mlp_bias)
    residual = {"none": 0, "parallel": dense, "sequential": dense + norm}[moe.residual_ffn]
    stacks = [(model.num_layers, 1)] if not model.encoder_layers else [(model.encoder_layers, 1), (model.num_layers, 2)]
    layers = sum(count * attentions * (attention_by_hand(config) + norm) + count * norm for count, attentions in stacks)
    layers += mixtures * (mixture + residual) + (sum(count for count, _ in stacks) - mixtures) * dense
    ends = len(stacks) * norm
    if config.attention.positions == "relative":
        ends += len(stacks) * config.attention.relative_buckets * model.num_heads
    total = tables + layers + ends
    return total, round(total - mixtures * (moe.num_experts - chosen) * expert)


@functools.cache
def counted(family: str, size: str) -> tuple[Config, ParameterCount]:
    """The model without multi-token prediction, and its parameters by the shapes of the real one."""
    settings = families.settings(family, size)
    settings["model"].setdefault("vocab_size", 320)
    config = families.resolve(families.merged(settings, {"model": {"mtp_depth": 0}}))
    return config, count_parameters(config, config.model.vocab_size)


@pytest.mark.parametrize("family, size", ROWS)
def test_every_model_has_the_parameters_that_its_dimensions_come_to(family, size):
    config, count = counted(family, size)
    assert (count.total, count.active) == by_hand(config)
    if size != "tiny":
        preset = families.FAMILIES[family].presets[size]
        assert (count.total / 1e9, count.active / 1e9) == pytest.approx((preset.total, preset.active), rel=0.005)


# In billions: total, active, and what of ours the authors leave out, for each of the two: nothing, a table (the one that is
# read), or both. None: they give no such figure. The tolerance is what rounding allows, and 0.5 % at least.
PUBLISHED = {
    ("shazeer", "moe_32"): (0.0378, None, "both"), ("shazeer", "moe_256"): (0.2729, None, "both"),
    ("shazeer", "moe_256_h"): (0.2729, None, "both"), ("shazeer", "moe_1024_h"): (1.079, None, "both"),
    ("shazeer", "moe_4096_h"): (4.3034, None, "both"),
    ("switch", "xxl"): (395, None, ""), ("switch", "c"): (1571, None, ""),
    ("glam", "0.1b_64e"): (1.9, None, "both"), ("glam", "1.7b_64e"): (27, None, "both"),
    ("glam", "8b_64e"): (143, None, "both"), ("glam", "64b_64e"): (None, 96.6, ""),
    ("st_moe", "large"): (4.1, None, ""), ("st_moe", "32b"): (269, None, ""),
    ("openmoe_paper", "base"): (0.65, None, ""), ("openmoe_code", "base"): (0.80, None, ""),
    ("openmoe_code", "8b"): (11.86, 2.75, "both of active"), ("openmoe_code", "34b"): (46.3, 8.46, "both of active"),
    ("mixtral", "8x7b"): (46.7, 12.9, ""), ("mixtral", "8x22b"): (141, 39, ""),
    ("qwen2_moe", "a2.7b"): (14.3, 2.7, ""), ("qwen2_moe", "57b_a14b"): (57.4, 14, ""),
    ("qwen3_moe", "30b_a3b"): (30.5, None, ""), ("qwen3_moe", "235b_a22b"): (235, 22, ""),
    ("deepseek_moe", "16b"): (16.4, 2.8, ""), ("deepseek_moe", "145b"): (144.6, None, ""),
    # 2.4 B of the Lite are said to be active: ours are 2.45 B without a table.
    ("deepseek_v2", "236b"): (236, 21, ""), ("deepseek_v2_lite", "16b"): (15.7, None, ""),
    ("deepseek_v3", "671b"): (671, 37, "table of active"), ("olmoe", "1b_7b"): (6.92, 1.28, ""),
    ("llama4", "scout"): (107.8, 17.2, ""), ("llama4", "maverick"): (400.7, 17.2, ""),
    ("gpt_oss", "20b"): (20.9, 3.6, "table of active"), ("gpt_oss", "120b"): (116.8, 5.12, "table of active"),
    ("nllb_moe", "54b"): (54.5, None, ""), ("dmoe", "xs"): (0.839, None, ""), ("dmoe", "small"): (3.693, None, ""),
    ("dmoe", "medium"): (13.041, None, ""),
}


def rounding(figure: float) -> float:
    """Half a unit of the last digit that is written, in relation to the figure; 0.5 % at least."""
    return max(0.5 * 10.0 ** -len(repr(figure).partition(".")[2]) / figure, 0.005) * 1.001


@pytest.mark.parametrize("family, size", PUBLISHED)
def test_it_is_what_the_authors_say(family, size):
    total, active, without = PUBLISHED[family, size]
    config, count = counted(family, size)
    table = config.model.vocab_size * config.model.d_model
    left_out = {"": 0, "both": count.embedding, "table": table}[without.removesuffix(" of active")]
    if total is not None:
        ours = count.total - (0 if without.endswith("of active") else left_out)
        assert ours / 1e9 == pytest.approx(total, rel=rounding(total))
    if active is not None:
        assert (count.active - left_out) / 1e9 == pytest.approx(active, rel=rounding(active))


def test_sizes_whose_authors_figures_are_not_met_say_why():
    """GShard's are rounded to 600, 150 and 37 B; Switch-Base's to 7, Large's to 26 B, which leave out more than the experts."""
    for (family, size), figure, off in ((("gshard", "600b"), 600, 0.04), (("gshard", "37b"), 37, 0.08),
                                        (("switch", "base"), 7, 0.07), (("switch", "large"), 26, 0.05)):
        preset = families.FAMILIES[family].presets[size]
        assert preset.total == pytest.approx(figure, rel=off)
    unnamed = {(f, s) for f, s in ROWS if s != "tiny"} - set(PUBLISHED)
    assert unnamed == {("gshard", "600b"), ("gshard", "150b"), ("gshard", "37b"), ("switch", "base"), ("switch", "large"),
                       ("expert_choice", "0.1b_64e"), ("expert_choice", "8b_64e"), ("openmoe_paper", "8b"),
                       ("openmoe_paper", "34b")}


def test_openmoes_paper_counts_three_matrices_and_one_table():
    """8.7 and 34 B are said, 8.78 and 34.6 are counted so."""
    for size, total in (("8b", 8.78), ("34b", 34.6)):
        assert families.FAMILIES["openmoe_paper"].presets[size].total == pytest.approx(total, rel=0.002)


# The table.


def test_it_loads_without_jax():
    code = "import sys, moe_jax; assert 'jax' not in sys.modules; from moe_jax import families; " \
           "assert 'jax' not in sys.modules; assert families.FAMILIES['mixtral'].presets['8x7b'].total == 46.7"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_settings_are_copies():
    families.settings("mixtral", "8x7b")["moe"]["num_experts"] = 3
    assert families.config("mixtral", "8x7b").moe.num_experts == 8


@pytest.mark.parametrize("call, words", [
    (("mixtrl",), r"There is no family 'mixtrl' \(did you mean 'mixtral'\?\); there are shazeer, "),
    (("mixtral", "8x7"), r"Mixtral has no size '8x7' \(did you mean '8x7b'\?\); it has 8x7b, 8x22b, tiny"),
])
def test_names_that_are_not_there(call, words):
    with pytest.raises(ConfigError, match=words):
        families.settings(*call)


# Models by name, in the place of a config file.


@pytest.mark.parametrize("family, size", ROWS)
def test_every_model_is_found_by_its_name(family, size):
    found, settings = load_config(f"{family}:{size}", []).to_dict(), families.settings(family, size)
    assert all(found[section][name] == value for section, values in settings.items() for name, value in values.items())
    assert (found["model"]["dtype"] == "bfloat16") == (size != "tiny")


def test_what_a_row_does_not_say_is_filled_in_and_may_be_overridden():
    assert load_config("mixtral:tiny", []) == load_config(str(ROOT / "configs/mixtral_tiny.py"), [])
    found = load_config("openmoe_code:8b", ["--config.data.batch_size=64", "--config.moe.capacity_factor=2"])
    assert found.model.remat == "block" and found.data.sequence_length == 2048  # the row's
    assert found.data.batch_size == 64 and found.moe.capacity_factor == 2.0
    assert load_config("mixtral:8x7b", []).data.sequence_length == 4096
    assert load_config("shazeer:moe_32", []).model.remat == "none"  # an LSTM has no blocks to compute again


@pytest.mark.parametrize("name, words", [
    ("mixtrl:8x7b", ["did you mean 'mixtral'", "family:size"]), ("mixtral:8x7", ["did you mean '8x7b'", "8x22b, tiny"]),
    ("mixtral", ["Mixtral has no size ''", "8x7b"]), ("mixtrl", ["there is no such file", "mixtral:8x7b"]),
    ("configs/mixtral:8x7b.py", ["there is no such file"])])
def test_a_name_that_is_not_there_is_refused_where_a_file_would_be(name, words):
    with pytest.raises(ConfigError) as error:
        load_config(name, [])
    assert str(error.value).startswith(f"--config={name}: ") and all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_an_override_of_a_named_model_is_checked_like_a_file_s():
    with pytest.raises(ConfigError, match="moe.num_experts"):
        load_config("mixtral:8x7b", ["--config.moe.num_expert=4"])
    with pytest.raises(ConfigError, match="four"):
        load_config("mixtral:8x7b", ["--config.moe.num_experts=four"])


# README's table.


def test_the_readme_has_a_row_for_every_family_with_its_sizes():
    lines = (ROOT / "README.md").read_text().splitlines()
    for family, row in families.FAMILIES.items():
        (line,) = [line for line in lines if line.startswith(f"| {row.title} |")]
        _, _, sizes, trains, hub, planned, _ = line.split("|")
        figures = lambda number: f"{number:.3g}" if number < 1000 else f"{number:,.0f}"
        wanted = [f"{size} {figures(preset.total)}, {figures(preset.active)}" for size, preset in row.presets.items()]
        assert [part.strip() for part in sizes.split(";") if part.strip()] == wanted
        assert f"(configs/{family}_tiny.py)" in trains
        for config in re.findall(r"\((configs/\w+.py)\)", planned):
            assert f"--config={config}" in (ROOT / config).read_text()
            assert f'of_family("{family}"' in (ROOT / config).read_text() or config == "configs/openmoe_34b.py"
        for config, slice_ in re.findall(r"\((configs/\w+.py)\) on (\S+?)[, ]", planned):
            assert f"--config={config} --slice={slice_}\n" in (ROOT / config).read_text()
        for name, slice_ in re.findall(r"`([\w:.]+)` on (\S+?)[, ]", planned):
            assert name.split(":")[0] == family and name.split(":")[1] in row.presets and parse_slice(slice_)
        assert (" on v" in planned) != ("none: " in planned) and planned.count(" on v") == planned.count("](") + planned.count("`") / 2
        assert (hub.strip() == "") == (family not in IMPORTED), family


# Families that have checkpoints at Hugging Face.
IMPORTED = {"switch", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_moe", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3",
            "olmoe", "llama4", "gpt_oss", "nllb_moe"}


def test_the_readme_names_the_architectures_that_are_imported():
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|") and "_tiny](configs/" in line]
    named = {name for line in rows for name in re.findall(r"`([\w-]+)`", line)}
    known = {name for family in huggingface.FAMILIES for name in family.model_types}
    assert named <= known and all(named & set(family.model_types) for family in huggingface.FAMILIES)
