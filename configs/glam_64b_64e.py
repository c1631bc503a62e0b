"""GLaM 64B/64E (Du et al. 2022, arXiv:2112.06905): 1,162 B parameters ("1.2T"), 96.6 B active per token.

As published: a decoder of 64 layers, width 8,192, feed-forward 32,768, gated (GEGLU) in dense layers and plain in
experts, 64 experts in every other layer, top-2 renormalised, 256 K vocabulary, batch of 1 M tokens of length 1,024,
Adafactor with 1/√step after 10,000 steps at 0.01, 600 B tokens. 128 heads of width 128 and one tied table are the
dimensions that give the published 96.6 B. Capacity is 2·T/E per expert, buffers fill by first, then second choices; a
later token can push an earlier one's second choice out (moe.allow_noncausal_routing). The balancing weight, 0.01, is not
in the paper's text at hand.

Different here: rotary instead of relative positions, RMSNorm instead of layer norm.

    moe-jax plan --config=configs/glam_64b_64e.py --slice=v5p-2048
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    config = of_family("glam", "64b_64e")
    config.model.update(dtype="bfloat16", remat="block")
    config.data.update(batch_size=1024, sequence_length=1024)
    config.mesh.update(fsdp=16, expert_limit=64)
    config.optimizer.update(name="adafactor", learning_rate=0.01, schedule="rsqrt", warmup_steps=10_000, weight_decay=0.0,
                            clip_norm=1.0)
    config.training.update(num_steps=572_000, output_z_weight=1e-4)
    return config
