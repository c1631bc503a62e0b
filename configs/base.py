"""Every setting with its meaning and default. Other configs start from this one and change what they need.

    moe-jax train --config=configs/base.py --config.training.num_steps=1000 --config.moe.num_experts=16

Units: tokens, sequences, steps, layers as named; learning rates and weights are plain factors. What cannot work
together is refused at the start with the legal values (moe_jax/config/, moe_jax/sharding.py).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    config.model = model = ConfigDict()
    model.num_layers = 4              # attention + feed-forward pairs
    model.d_model = 128               # width of the residual stream (D)
    model.num_heads = 4               # query heads (H)
    model.num_kv_heads = 4            # key/value heads; fewer = grouped-query attention; must divide num_heads
    model.head_dim = 32               # width of one head; even
    model.d_ff = 512                  # hidden width of the dense feed-forward layers
    model.activation = "swiglu"       # dense layers: gated swiglu, geglu, geglu_exact, reglu, glu, bilinear,
                                      # swiglu_clamped (3 matrices), swiglu_linear (4); silu, gelu, gelu_exact, relu,
                                      # relu_squared (2): docs/conventions.md
    model.attention = "auto"          # plain, splash (Pallas kernel for TPUs that holds no scores), or auto: splash on a TPU
                                      # where lengths and heads permit; tokens are written one by one with plain
    model.scaled_attention = True     # scores are divided by sqrt(head_dim); False (T5, OpenMoE): the query matrix
                                      # starts smaller by that factor instead
    model.tie_embedding = False       # use the embedding table as output layer (logits are scaled by 1/sqrt(D))
    model.scaled_tied_logits = True   # with tie_embedding: False leaves the 1/sqrt(D) out
    model.embedding_scale = False     # embeddings times sqrt(D), as they enter the first layer (NLLB)
    model.vocab_size = 0              # rows of the table; 0 = the vocabulary's size rounded up to a multiple of 64
    model.rope_theta = 10_000.0       # base of the rotary position frequencies
    model.norm = "rms"                # rms (scale only), or layer (mean taken off, scale and bias: NLLB)
    model.norm_epsilon = 1e-6         # inside the square root of the norms
    model.mlp_bias = False            # biases in the dense feed-forward layers
    model.init_scale = 1.0            # kernels: truncated normal with variance init_scale / fan_in (Switch §2.4: 0.1)
    model.embedding_init = 1.0        # standard deviation of the embedding table
    model.dtype = "float32"           # compute: float32 or bfloat16; parameters and routing are always float32
    model.remat = "none"              # recompute in the backward pass: none, block (all), dots (all but products)
    model.scan_layers = True          # lax.scan over the repeating block of layers; False unrolls: compiles longer,
                                      # draws other initial values and gives other paths in checkpoints
    model.mtp_depth = 0               # multi-token prediction (DeepSeek-V3: 1): so many further tokens are predicted, each by
                                      # a block of its own, in training only
    model.encoder_layers = 0          # above 0: an encoder–decoder; num_layers are then the decoder's
    model.encoder_embedding = False   # its encoder has an embedding table of its own
    model.architecture = "transformer"  # transformer, or lstm (Shazeer 2017): num_layers LSTMs of d_model units, with a
                                      # mixture behind those that moe.every, moe.first say, and no other FFN
    model.dropout = 0.0               # lstm: training drops this share of the embeddings and of every layer's output

    config.attention = attention = ConfigDict()
    attention.kind = "heads"          # heads, or latent: keys and values from one small vector per token (DeepSeek-V2, V3)
    attention.layers = "full"         # what each layer sees, repeated over the layers: full, sliding, chunked, separated by
                                      # commas; with ":nope" without rotary positions. "sliding,full" (GPT-OSS),
                                      # "chunked,chunked,chunked,full:nope" (Llama-4): docs/conventions.md
    attention.window = 0              # tokens that a query of a sliding layer sees, itself included
    attention.chunk = 0               # chunked layers see their own so many positions of the text, counted from 0
    attention.bias = "none"           # none, qkv (Qwen2), all: also of the output (GPT-OSS); kind="latent": of the latents, the
                                      # shared key and the output
    attention.sinks = False           # a learned logit per head takes part in the softmax and has no value (GPT-OSS)
    attention.clip_qkv = 0.0          # queries, keys and values are cut to ±this, after qk_norm; 0 = off (OLMoE)
    attention.qk_norm = "none"        # RMSNorm of queries and keys: head (each alone: Qwen3), all_heads (together: OLMoE),
                                      # unscaled (each alone, after rotation, without weights: Llama-4)
    attention.positions = "rotary"    # rotary, relative (T5), sinusoidal (added to the embeddings: NLLB), none
    attention.rope_pairs = "half"     # dimension i is paired with i + d/2, or interleaved: with its neighbour (Llama-4,
                                      # DeepSeek-V2, V3)
    attention.rope_scaling = "none"   # of the rotary frequencies, for longer texts: linear, llama3, yarn (GPT-OSS, DeepSeek)
    attention.rope_factor = 1.0       # … how many times longer
    attention.rope_original_length = 0  # … than this many tokens (not of linear)
    attention.rope_low_factor = 1.0   # llama3: waves longer than rope_original_length / this are stretched whole
    attention.rope_high_factor = 4.0  # … shorter than rope_original_length / this not at all
    attention.rope_beta_fast = 32.0   # yarn: dimensions with more turns than this in the original length stay as they are
    attention.rope_beta_slow = 1.0    # … with fewer than this are stretched whole
    attention.rope_truncate = True    # … both bounds go to whole dimensions (GPT-OSS: False)
    attention.rope_mscale = 0.0       # … and sine and cosine are multiplied by m(rope_mscale) / m(rope_mscale_all_dim) with
                                      # m(x) = 0.1 x ln(rope_factor) + 1, if both are above 0, else by m(1) (DeepSeek)
    attention.rope_mscale_all_dim = 0.0  # … kind="latent" also multiplies its scores by m(rope_mscale_all_dim)²
    attention.rope_attention_factor = 0.0  # … or by this; 0 = by that formula
    attention.temperature_scale = 0.0  # ":nope" layers: queries times 1 + this · ln(1 + floor((position + 1) /
                                      # temperature_floor)) (Llama-4: 0.1)
    attention.temperature_floor = 8192  # tokens
    attention.query_rank = 0          # latent: queries too come from a vector so wide; 0 = straight from the stream
    attention.latent_rank = 0         # … width of the latent that is cached (DeepSeek-V3: 512)
    attention.rope_dim = 0            # … width of the rotary part of model.head_dim, whose key all heads share (64)
    attention.value_dim = 0           # … width of a head's value (128)
    attention.relative_buckets = 32   # positions="relative": learned biases per head
    attention.relative_distance = 128  # … the last bucket holds everything so far away, and further
    attention.first_position = 0      # positions="sinusoidal": the number of a text's first position (NLLB: 2)

    config.moe = moe = ConfigDict()
    moe.num_experts = 8               # E; 0 = dense model, everything else in this section is then unused
    moe.experts_per_token = 2         # K; for expert_choice the mean number of experts per token
    moe.every = 2                     # one layer in so many is a mixture of experts
    moe.first = -1                    # which one of each period: 0 … every-1; -1 = the last (OpenMoE)
    moe.first_dense_layers = 0        # the first so many layers are dense all the same (DeepSeekMoE-16B: 1, DeepSeek-V3: 3);
                                      # their width, as that of every dense layer, is model.d_ff
    moe.layers = ""                   # instead of the last three: the MoE layers one by one, '1,3,5' (from 0), or 'none'
    moe.encoder_layers = ""           # the same of the encoder (model.encoder_layers); '' = by every, first, first_dense_layers
    moe.d_ff = 512                    # hidden width of one expert (F)
    moe.activation = "swiglu"         # of the experts, as model.activation
    moe.activation_limit = 7.0        # swiglu_clamped cuts gates above this, and the linear branch on both sides (GPT-OSS)
    moe.activation_alpha = 1.702      # … and its sigmoid is that of so many times the gate
    moe.expert_bias = False           # every expert adds a bias to both of its products (V-MoE, GPT-OSS)
    moe.num_shared_experts = 0        # experts that every token passes, beside the routed ones (DeepSeekMoE)
    moe.shared_d_ff = 0               # hidden width of each of them; 0 = d_ff (Qwen2-MoE's is wider)
    moe.shared_gate = False           # their output times sigmoid(w·x) with a learned w (Qwen2-MoE)
    moe.residual_ffn = "none"         # one more dense FFN (model.d_ff) in MoE layers: parallel to the experts (OpenMoE's
                                      # paper), or sequential: after them, with a norm of its own (its code, ST-MoE)
    moe.output_dropout = 0.0          # training drops the routed experts' output of this share of the tokens, evaluation multiplies
                                      # it with 1 - x (NLLB: 0.2)
    moe.num_identity_experts = 0      # zero-computation experts, chosen like the others, beside num_experts: gate · x
    moe.num_zero_experts = 0          # … 0
    moe.num_constant_experts = 0      # … gate · (α1·x + α2·v) with learned v and (α1, α2) = softmax(W·x) (MoE++)
    moe.zero_expert_weight = 1.0      # of the three kinds in the balancing loss; below 1 they get more tokens (MoE++: 0.75)
    moe.expert_widths = ""            # instead of d_ff: '256*4,512*2' = four experts of width 256, then two of 512;
                                      # dropless only
    moe.expert_copies = 0             # experts that the devices hold, copies of busy ones counted, in evaluation and
                                      # generation; comes with moe-jax eval --placement. 0: one of each, as in training
    moe.router = "top_k"              # top_k (tokens choose), noisy_top_k (the same with learned noise: Shazeer 2017),
                                      # hierarchical (noisy at two levels),
                                      # expert_choice (experts choose), reinforce (draws, learns by reward) …:
                                      # routing.ROUTERS, docs/conventions.md
    moe.score = "softmax"             # of the logits over experts, or sigmoid of each (DeepSeek-V3, Llama-4)
    moe.gate_order = "softmax_then_top_k"  # or top_k_then_softmax (Mixtral): docs/conventions.md
    moe.renormalize = False           # divide the K gates by their sum (GShard, Qwen3); not with K = 1
    moe.renormalize_after_drops = False  # divide them by the sum of those that found a slot (NLLB); not with renormalize
    moe.route_scale = 1.0             # the gates times this (DeepSeek-V2: 16, DeepSeek-V3: 2.5)
    moe.gate_on = "output"            # the gate multiplies the expert's output, or its input (Llama-4)
    moe.second_policy = "all"         # which choices after the first are made: all, none, threshold (gate above
                                      # second_threshold), random (probability gate / second_threshold; training only)
    moe.second_threshold = 0.2        # Mesh-TensorFlow and ST-MoE: 0.2; GShard's random second expert: 0.5
    moe.second_in_queue = False       # a choice that is not made passes its expert's queue all the same (GShard)
    moe.num_groups = 1                # equal groups of consecutive experts: nodes or devices (DeepSeek-V2, V3)
    moe.groups_per_token = 0          # a token chooses inside its best so many groups; 0 = among all experts
    moe.group_score = "max"           # of a group: its best score (DeepSeek-V2), or top_sum of its best K /
                                      # groups_per_token (DeepSeek-V3), or top_2_sum of its best two (its code)
    moe.fill_order = "token_major"    # who gets a buffer slot first: token_major (causal), choice_major (GShard,
                                      # Switch, OpenMoE), batch_prioritized (V-MoE); the last two look ahead
    moe.priority = "max"              # batch_prioritized sorts by the highest, or the sum, of a token's K scores
    moe.router_init = 0.02            # standard deviation of the router's weights, and of the shared expert's gate; 0 (Shazeer
                                      # 2017) where noise tells experts apart
    moe.router_bias = False           # a learned number per expert is added to its logit (GPT-OSS); bias_update_rate is another
                                      # one, which chooses only
    moe.router_dtype = "float32"      # bfloat16 rounds the router's input, weights and logits, whatever model.dtype is; only
                                      # to see what that does (Switch §2.4, ST-MoE §3.4)
    moe.router_jitter = 0.0           # training noise: router input times U(1-x, 1+x) (Switch: 0.01)
    moe.router_noise = 0.0            # training noise: logits plus N(0, (x/E)²) (V-MoE: 1.0)
    moe.dispatch = "gather"           # training: gather or einsum (buffers of fixed capacity), dropless, reference
    moe.eval_dispatch = "dropless"    # evaluation, as dispatch; generation is always dropless
    moe.grouped_matmul = "auto"       # what dropless multiplies with: auto (by platform and shape), portable, ragged_dot,
                                      # megablox (TPU), tokamax (GPU, TPU; pip install 'moe_jax[tokamax]')
    moe.expert_parallelism = "compiler"  # how tokens reach experts on other devices: compiler (XLA inserts the all-to-all from
                                      # where the buffers lie; dropless, which has none, as shard_map), shard_map (written
                                      # out), none (tokens stay, every device gathers the weights of all experts)
    moe.row_exchange = "padded"       # rows of dropless travel padded (all_to_all, anywhere), ragged (ragged_all_to_all: TPU,
                                      # GPU; half the bytes, more work around them by the compiler's estimate), auto
                                      # (ragged where it compiles)
    moe.row_exchange_factor = 2.0     # rows that two devices exchange at once, over a balanced load; more travel in further
                                      # rounds, nothing is dropped
    moe.exchange_chunks = 1           # a device's groups in so many parts: one travels while the experts compute another
                                      # (docs/parallelism.md)
    moe.capacity_factor = 1.25        # buffer slots per expert over the balanced load (see capacity_counts)
    moe.eval_capacity_factor = 2.0    # the same where eval_dispatch has buffers
    moe.expert_capacity = 0           # slots per expert and group, in training and evaluation, instead of the factors; 0 = by them
                                      # (Switch's checkpoints: 64)
    moe.capacity_counts = "choices"   # balanced load = K·T/E choices (V-MoE), "tokens" = T/E (flaxformer, OpenMoE), or "group" = T
                                      # (NLLB); with expert_choice the factor is then the mean number of experts per token
    moe.capacity_rounding = "default" # slots to whole numbers: default = up for choices, nearest for tokens; up, nearest
    moe.capacity_multiple = 1         # round slots up to a multiple of this (V-MoE: 4)
    moe.min_capacity = 4              # slots per expert at least (never more than T)
    moe.device_capacity_factor = 0.0  # training: choices per device (num_groups) over the balanced load, the lowest gates
                                      # beyond it are dropped; 0 = off (DeepSeek-V2: 1.0)
    moe.undropped_sequences = 0.1     # share of sequences of which it drops nothing (DeepSeek-V2: 0.1)
    moe.padding = "nowhere"           # padding is invisible; for comparison: flaxformer's mask and scatter routers,
                                      # "in_means" and "takes_slots", OpenMoE, "routed", and Switch's checkpoints,
                                      # "as_text": docs/conventions.md
    moe.group_size = 0                # tokens that compete for buffer slots; 0 = one sequence (group_over="batch": all
                                      # sequences of a microbatch)
    moe.group_over = "sequence"       # a group is consecutive tokens, "batch": one position of many sequences, or "all":
                                      # all tokens of a microbatch, which one device then holds (NLLB)
    moe.balance_loss = "switch"       # switch, first_choice, gshard, st_moe: docs/conventions.md
    moe.balance_scope = "group"       # statistics over one group, one sequence (row), one document of a packed row, one
                                      # microbatch, or the global batch
    moe.balance_weight = 0.01         # of the balancing loss (mean over MoE layers)
    moe.importance_weight = 0.0       # of CV² of the experts' summed gates (Shazeer 2017: 0.1; V-MoE: 0.005)
    moe.load_weight = 0.0             # of CV² of their expected load under the router's noise (the same)
    moe.device_weight = 0.0           # of the balance over num_groups devices (DeepSeekMoE: 0.05)
    moe.communication_weight = 0.0    # of the balance of tokens sent to devices (DeepSeek-V2: 0.02)
    moe.router_z_weight = 1e-4        # of the router z loss (ST-MoE: 1e-3; OpenMoE: 1e-4)
    moe.bias_update_rate = 0.0        # loss-free balancing: step of the selection bias; 0 = off (Wang 2024: 1e-3)
    moe.bias_update = "sign"          # every step the same, or "magnitude": rate times the relative violation
    moe.bias_centered = False         # take the mean off every step, so that the biases always sum to 0
    moe.hash_function = "random"      # router=hash, expert by: random, bigram, previous_token, position, or by a table:
                                      # balanced, clustered, dispersed (moe_jax/routing/hash_tables.py)
    moe.hash_seed = 0                 # of the computed hashes; MultiHash (experts_per_token > 1) derives one per hash
    moe.hash_table = ""               # .npy file with the expert of every token id
    moe.transport_plan = "entropic"   # of transport_top_k and transport_expert_choice: entropic, quadratic, or k_sparse
                                      # (quadratic with so many entries as are chosen)
    moe.transport_gate = "softmax"    # of these routers: the softmax score, or the entry of the plan
    moe.transport_rate = 0.01         # learning rate of Adam, which finds quadratic and k_sparse plans (V-MoE: 0.01)
    moe.transport_tolerance = 1e-4    # router=sinkhorn: stop when a round moves the column scales less (Megatron: 1e-4);
                                      # quadratic, k_sparse: when the gradient is smaller (V-MoE: 1e-3)
    moe.transport_iterations = 100    # rounds at most: of scaling (sinkhorn, s_base, entropic, capped expert_choice), bids
                                      # (base), Adam (quadratic, k_sparse; V-MoE: 20)
    moe.experts_per_token_cap = 0     # expert_choice: no token to more experts than this, nearly; 0 = to any number
    moe.cap_entropy = 1e-3            # how soft the plan that keeps to the cap is (Zhou et al. 2022: 1e-3); at most 1
    moe.policy_weight = 1.0           # router=reinforce: of the policy gradient; 1 = that of the expected cross-entropy
    moe.policy_sampling = "sample"    # training draws the expert from the policy, or takes the best one: greedy
    moe.policy_entropy_weight = 0.01  # of the entropy bonus
    moe.policy_baseline = "learned"   # taken off the reward: a linear head per layer, the running mean reward, or none
    moe.policy_baseline_weight = 0.01 # of the learned baseline's squared error; it trains that head alone
    moe.policy_baseline_decay = 0.99  # of the running mean, per step
    moe.allow_noncausal_routing = False  # let a decoder train with a router that sees later tokens
    moe.allow_untrained_router = False  # of imported checkpoints: one expert per token with a gate of 1, whose router gets no
                                      # gradient from the task; such a model is evaluated and generates, training refuses it

    config.data = data = ConfigDict()
    data.source = "standard_library"  # standard_library, synthetic, files:<folder or glob>, tfds:<name>, seqio:<name>
    data.vocabulary = "bytes"         # bytes, sentencepiece:<size> (trained on the corpus once), or a .model file; of imported
                                      # models tokenizer:<a tokenizer.json> or ids:<size>, ids written as numbers
    data.domain_weights = ""          # '' = as large as they are; 'code=2,docs=1' = share of each domain's rows
    data.sequence_length = 256        # tokens per row (S); documents are packed
    data.batch_size = 16              # rows per step over all devices (B)
    data.validation_fraction = 0.05   # of the documents, picked by hash
    data.max_bytes = 0                # use only so much of the corpus; 0 = all
    data.cache_dir = ""               # tokenised corpora; '' = $MOE_JAX_CACHE, else the user's cache folder
    data.seed = 0                     # order of the training rows, and the text of the source synthetic
    data.streaming = False            # tfds/seqio: read through tf.data instead of tokenising once
    data.text_field = "text"          # of jsonl lines and TFDS examples
    data.objective = "causal"         # causal, prefix_lm, span_corruption (T5), ul2, openmoe (its UL2 mixture): docs/data.md
    data.span_mean = 3.0              # span_corruption: tokens of a hidden span, on average
    data.span_rate = 0.15             # … share of the text that is hidden
    data.sentinels = 0                # ids at the end of the vocabulary that stand for hidden spans; 0 = as many as a row needs
                                      # (T5: 100, OpenMoE: 300)
    data.prefix_attention = "causal"  # of what is given: causal (OpenMoE), or bidirectional (prefix LM of Raffel et al. 2020)
    data.target_length = 0            # of an encoder–decoder: tokens per row of the decoder, which writes the targets; the
                                      # encoder's rows, of what is given, have sequence_length (T5: 114 and 512): docs/encoder_decoder.md

    config.mesh = mesh = ConfigDict()
    mesh.data = 0                     # devices along each axis; 0 = what remains
    mesh.fsdp = 1                     # parameters are stored in shares along this axis
    mesh.expert = 0                   # experts are spread over this axis; 0 = the largest number that divides both
                                      # num_experts and the devices, at most expert_limit
    mesh.tensor = 1                   # heads and hidden widths are spread over this axis
    mesh.expert_limit = 4             # for mesh.expert = 0; 0 = no limit
    mesh.expert_nodes = 1             # the expert axis is so many nodes of a slower network: a token goes to each at most
                                      # once (dropless)
    mesh.slice_axis = "data"          # the axis that reaches over several slices (docs/tpu.md); others stay within one

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"          # adamw, adafactor (as T5X), sgd
    optimizer.learning_rate = 3e-3    # the highest
    optimizer.schedule = "cosine"     # cosine, rsqrt (T5, OpenMoE), wsd (warm-up, stable, decay), constant
    optimizer.warmup_steps = 50       # linear; for rsqrt: the flat beginning
    optimizer.decay_steps = 0         # wsd: length of the final decay
    optimizer.final_fraction = 0.1    # of learning_rate, where cosine and wsd end
    optimizer.weight_decay = 0.1      # decoupled; not on norm scales
    optimizer.beta1 = 0.9             # adamw
    optimizer.beta2 = 0.95            # adamw
    optimizer.epsilon = 1e-8          # adamw
    optimizer.momentum = 0.0          # sgd
    optimizer.clip_norm = 1.0         # global gradient norm; 0 = no clipping

    config.training = training = ConfigDict()
    training.num_steps = 300          # optimizer steps
    training.microbatches = 1         # gradient accumulation; losses keep their scope (balance_scope)
    training.output_z_weight = 1e-4   # of (log Z)² of the output logits (PaLM, OpenMoE)
    training.label_smoothing = 0.0    # share of the target spread over the other ids; 0 = off
    training.mtp_weight = 0.3         # of multi-token prediction, the mean over depths (DeepSeek-V3: 0.3, then 0.1)
    training.ema_decay = 0.0          # running mean of the parameters, used for evaluation and samples; 0 = off
    training.log_every = 10           # steps per line of metrics and progress
    training.eval_every = 100         # steps per validation
    training.eval_batches = 20        # batches per validation
    training.checkpoint_every = 100   # steps per checkpoint; the last step is always saved
    training.keep_checkpoints = 3     # newest verified ones
    training.nonfinite = "stop"       # a step that is not finite: stop before the update, or skip it
    training.max_skipped_steps = 10   # for skip
    training.tensorboard = True       # scalars to <workdir>/tensorboard; metrics.jsonl is always written
    training.wandb = False            # Weights & Biases, if installed
    training.profile_start = 0        # first step of a profile in <workdir>/profile
    training.profile_steps = 0        # its length; 0 = none
    training.sample_prompts = "def |import |The "  # continued at the end; separated by |
    training.sample_length = 128      # tokens per sample; 0 = none
    training.seed = 0                 # parameters and router noise
    return config


def of_family(family: str, size: str = "tiny") -> ConfigDict:
    """The settings above with those of a published model over them: a row of moe_jax/models/families.py."""
    from moe_jax import families

    config = get_config()
    for section, values in families.settings(family, size).items():
        config[section].update(values)
    return config
