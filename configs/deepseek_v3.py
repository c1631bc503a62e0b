"""DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437): 671 B parameters, 37.6 B active per token.

As published: 61 layers, width 7,168, multi-head latent attention (a latent of 512 and a rotary key of 64 per token are all that
is cached), the first three layers dense (18,432), then one shared and 256 routed experts of width 2,048; top-8 of sigmoid
scores inside the best 4 of 8 groups of experts, gates renormalised and times 2.5; balancing by bias (0.001) and a
sequence-wise loss (1e-4); one further token predicted in training, by a block of its own (11.6 B more parameters);
vocabulary, untied output layer, AdamW, batch and length of the main phase. Rotary frequencies are those of the released
model, stretched by YaRN after training at length 4,096 (attention.rope_scaling).

Different here: training in fp8 is left out; the published schedule has a constant and three lower stages, here the last
quarter decays linearly. DeepSeek-V3 drops no token; training here fills buffers of 1.25 times the balanced load
(moe.dispatch), evaluation is dropless.

    moe-jax plan --config=configs/deepseek_v3.py --slice=v5p-2048
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    config = of_family("deepseek_v3", "671b")
    config.model.update(dtype="bfloat16", remat="block")
    config.data.update(batch_size=15_360, sequence_length=4096)
    config.mesh.update(fsdp=16, expert_limit=64)
    config.optimizer.update(name="adamw", learning_rate=2.2e-4, schedule="wsd", warmup_steps=2000, decay_steps=60_000,
                            weight_decay=0.1, beta1=0.9, beta2=0.95, clip_norm=1.0)
    # 14.8 T tokens; 3,072 sequences at a time, the batch that training began with.
    config.training.update(num_steps=235_000, microbatches=5, output_z_weight=0.0)
    return config
