"""The mesh, and which dimension of an array lies on which mesh axis.

Three tables from dimension letter (docs/conventions.md) to mesh axis, read through :func:`spec`. Trying another layout
means editing these tables. The mesh is *explicit*: shardings are part of array types, an ambiguous one is an error.
"""

import math
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from moe_jax.config import Config, ConfigError, nearest_divisors, nearest_multiples

AXES = ("data", "fsdp", "expert", "tensor")

# Tokens are spread over every axis but `tensor`; the expert axis is a data axis outside the experts.
TOKEN_AXES = ("data", "fsdp", "expert")

# Parameters at rest. `fsdp` is gathered before use (see `gathered`); R is the width of a latent (moe_jax/nn/latent_attention.py).
PARAMETERS = {"E": "expert", "D": "fsdp", "R": "fsdp", "F": "tensor", "H": "tensor", "V": "tensor"}

# Activations: B sequences, G groups of tokens, N assignments, all lie where their tokens lie.
ACTIVATIONS = {"B": TOKEN_AXES, "G": TOKEN_AXES, "H": "tensor", "F": "tensor", "V": "tensor"}

# Expert buffers once the all-to-all has brought every expert its tokens: `expert` moved from G to E. T = G·C are the
# rows of one expert.
EXPERT_BUFFERS = {"G": ("data", "fsdp"), "T": ("data", "fsdp"), "E": "expert", "F": "tensor"}


def spec(letters: str, table: dict[str, Any]) -> P:
    """The PartitionSpec of an array whose dimensions are ``letters``, e.g. ``spec('EDF', PARAMETERS)``."""
    return P(*(table.get(letter) for letter in letters))


def resolve_mesh(config: Config, num_devices: int) -> dict[str, int]:
    """Sizes of the mesh axes for ``num_devices`` devices, automatic ones filled in, checked against the run.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, or a sharded dimension does not divide.
    """
    mesh, moe = config.mesh, config.moe
    fixed = mesh.fsdp * mesh.tensor
    if num_devices % fixed:
        raise ConfigError(f"mesh.fsdp={mesh.fsdp} x mesh.tensor={mesh.tensor} = {fixed} does not divide "
                          f"{num_devices} devices; nearest legal products: {nearest_divisors(fixed, num_devices)}.")
    free = num_devices // fixed
    expert = mesh.expert
    if expert == 0:
        experts = 1 if moe.is_dense else math.gcd(*(count for _, count in moe.width_classes))
        common = math.gcd(experts, free if mesh.data == 0 else max(1, free // mesh.data))
        limit = mesh.expert_limit or common
        legal = [d for d in range(1, min(common, limit) + 1) if common % d == 0 and d % mesh.expert_nodes == 0]
        expert = max(legal, default=1)
    data = mesh.data or max(1, free // expert)
    sizes = {"data": data, "fsdp": mesh.fsdp, "expert": expert, "tensor": mesh.tensor}
    if data * expert != free:
        raise ConfigError(
            f"mesh {_product(sizes)} = {math.prod(sizes.values())} does not match {num_devices} devices; with "
            f"fsdp={mesh.fsdp} and tensor={mesh.tensor}, mesh.data x mesh.expert must be {free} (nearest legal "
            f"mesh.data: {nearest_divisors(data, free)}; mesh.expert: "
            f"{nearest_divisors(expert, _common_divisor(config, 'expert', free))}; mesh.data=0 fills in the rest).")
    _check_divisible(config, sizes)
    if expert % mesh.expert_nodes:
        raise ConfigError(f"mesh.expert_nodes={mesh.expert_nodes} does not divide mesh.expert={expert}; nearest legal values: "
                          f"{nearest_divisors(mesh.expert_nodes, expert)}.")
    _check_chunks(config, sizes)
    return sizes


def _product(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items())


def _sharded_dimensions(config: Config) -> list[tuple[str, int, str]]:
    """(setting, its value, the mesh axis that has to divide it)."""
    model, moe = config.model, config.moe
    found = [("model.d_model", model.d_model, "fsdp"), ("model.vocab_size", model.vocab_size, "tensor")]
    if model.architecture == "lstm":
        found.append(("model.d_model", model.d_model, "tensor"))
    else:
        found += [("model.num_heads", model.num_heads, "tensor"), ("model.num_kv_heads", model.num_kv_heads, "tensor"),
                  ("model.d_ff", model.d_ff, "tensor")]
    found += [(f"attention.{field}", getattr(config.attention, field), "fsdp") for field in ("query_rank", "latent_rank")]
    if moe.is_dense:
        return found
    if moe.expert_widths:
        for width, count in moe.width_classes:
            found += [(f"moe.expert_widths={moe.expert_widths!r}: the count of width {width}", count, "expert"),
                      (f"moe.expert_widths={moe.expert_widths!r}: width", width, "tensor")]
    else:
        found.append(("moe.expert_copies" if moe.expert_copies else "moe.num_experts", moe.num_copies, "expert"))
    if not moe.expert_widths or moe.num_shared_experts and not moe.shared_d_ff:
        found.append(("moe.d_ff", moe.d_ff, "tensor"))
    if moe.shared_d_ff:
        found.append(("moe.shared_d_ff", moe.shared_d_ff, "tensor"))
    return found


def _common_divisor(config: Config, axis: str, devices: int) -> int:
    """The largest size of a mesh axis that divides ``devices`` and all that lies on it; its divisors do too."""
    return math.gcd(devices, *(value for _, value, where in _sharded_dimensions(config) if where == axis))


def _check_divisible(config: Config, sizes: dict[str, int]) -> None:
    """Refuses a mesh over which a sharded dimension does not divide evenly."""
    for key, value, axis in _sharded_dimensions(config):
        if value % sizes[axis]:
            # What another size leaves over goes to `data`, and to `expert` where that is automatic.
            free = {axis, "data"} | ({"expert"} if config.mesh.expert == 0 else set())
            common = _common_divisor(config, axis, math.prod(sizes[name] for name in free))
            rest = " (mesh.data=0 fills in the rest)" if config.mesh.data else ""
            raise ConfigError(f"{key}={value} does not divide over mesh.{axis}={sizes[axis]}; nearest legal values of "
                              f"{key}: {nearest_multiples(value, sizes[axis])}; of mesh.{axis}: "
                              f"{nearest_divisors(sizes[axis], common)}{rest}.")
    token_shards = math.prod(sizes[axis] for axis in TOKEN_AXES)
    microbatch = config.data.batch_size // config.training.microbatches
    if microbatch % token_shards:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} in training.microbatches={config.training.microbatches} gives "
            f"{microbatch} sequences, which do not divide over data x fsdp x expert = {token_shards} devices; nearest "
            f"legal data.batch_size: {nearest_multiples(config.data.batch_size, token_shards * config.training.microbatches)}.")
    sequences = config.sequences_per_group
    if config.moe_layers and config.moe.group_over == "all" and token_shards > 1:
        raise ConfigError(f"moe.group_over='all': all tokens of a microbatch are one group, which lies on one device, but data x "
                          f"fsdp x expert = {token_shards} share them; set mesh.data=1, mesh.fsdp=1 and mesh.expert=1, or another "
                          f"moe.group_over.")
    if not config.moe.is_dense and (microbatch // token_shards) % sequences:
        raise ConfigError(
            f"moe.group_size={config.moe.group_size} spans {sequences} sequences, but each of the {token_shards} token "
            f"shards (mesh data x fsdp x expert) holds {microbatch // token_shards}; a group must lie on one shard. "
            f"Nearest legal numbers of sequences: {nearest_divisors(sequences, microbatch // token_shards)}.")


def _check_chunks(config: Config, sizes: dict[str, int]) -> None:
    """Refuses parts of a device's groups that are not whole groups."""
    moe, length = config.moe, config.data.sequence_length
    if moe.is_dense or moe.exchange_chunks == 1:
        return
    positions = 1 if moe.group_over == "batch" else min(moe.group_size or length, length)
    sequences = config.data.batch_size // config.training.microbatches // math.prod(sizes[axis] for axis in TOKEN_AXES)
    groups = sequences // config.sequences_per_group * (length // positions)
    if groups % moe.exchange_chunks:
        raise ConfigError(f"moe.exchange_chunks={moe.exchange_chunks} does not divide the {groups} groups of tokens that a device "
                          f"has (moe.group_size, data.batch_size); nearest legal values: "
                          f"{nearest_divisors(moe.exchange_chunks, groups)}.")


def make_mesh(sizes: dict[str, int], devices: list[jax.Device] | None = None,
              slice_axis: str = "data") -> jax.sharding.Mesh:
    """The explicit mesh of :func:`resolve_mesh`'s sizes; pass it to ``jax.set_mesh``.

    Neighbours along ``tensor``, then ``expert``, then ``fsdp`` are laid next to each other in the torus of a TPU slice.
    Several slices, which only the data centre's network joins, divide the axis ``slice_axis``; along ``data``, gradients
    alone go between them.

    Raises:
      ConfigError: that axis does not divide over the slices.
    """
    devices = jax.devices()[: math.prod(sizes.values())] if devices is None else list(devices)
    return jax.sharding.Mesh(placed(sizes, devices, slice_axis), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def placed(sizes: dict[str, int], devices: list[Any], slice_axis: str = "data") -> np.ndarray:
    """The devices as :func:`make_mesh` lays them out, an array with a dimension for each of :data:`AXES`."""
    shape = tuple(sizes[axis] for axis in AXES)
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    # Split: an axis may be a part of one side of the torus, as is 8 of 4x4x4. (jax.make_mesh refuses that on v4 and v5p.)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if sizes[slice_axis] % slices:
        others = " or ".join(repr(axis) for axis in AXES if sizes[axis] % slices == 0)
        raise ConfigError(f"mesh.{slice_axis}={sizes[slice_axis]} does not divide over {slices} slices, and no other axis "
                          f"reaches from slice to slice; nearest legal values: "
                          f"{nearest_multiples(sizes[slice_axis], slices)}"
                          f"{f'; or mesh.slice_axis={others}' if others else ''}.")
    across = tuple(slices if axis == slice_axis else 1 for axis in AXES)
    inside = tuple(size // number for size, number in zip(shape, across))
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def gathered(weight: jax.Array, letters: str, dtype: jnp.dtype) -> jax.Array:
    """A parameter as it is used: cast, then complete along D (or R).  [D_fsdp, ...] -> all-gather -> [D, ...].

    Cast first: the gather moves compute-dtype bytes. Its gradient is a reduce-scatter where XLA makes one of the all-reduce
    and the slice that it is given; with ``data`` above 1 it often does not.
    """
    return jax.reshard(weight.astype(dtype), spec(letters, {**PARAMETERS, "D": None, "R": None}))


def over_groups(function: Callable, *arrays: Any) -> Any:
    """``function`` on every group: arrays (or pytrees) lead with G, and so do the results.

    Runs under ``jax.shard_map``, where sorts and gathers see one device's groups and stay there.
    """
    return per_device(jax.vmap(function), *arrays)


def per_device(function: Callable, *arrays: Any, replicated: Any = ()) -> Any:
    """``function(*arrays, *replicated)`` once per device, on the groups (leading dimension) that lie there.

    ``replicated`` are given whole to every device: [E_expert, ...] -> all-gather -> [E, ...].
    """
    tokens = without_single_axes(P(TOKEN_AXES))
    arrays = jax.tree.map(lambda a: jax.reshard(a, tokens), tuple(arrays))
    replicated = jax.tree.map(lambda a: jax.reshard(a, P()), tuple(replicated))
    in_specs = (jax.tree.map(lambda _: tokens, arrays), jax.tree.map(lambda _: P(), replicated))

    def local(arrays, replicated):
        first = jax.tree.leaves(arrays)[0]
        return function(*arrays, *jax.tree.map(lambda r: varying_like(r, first), replicated))

    results = jax.shard_map(local, in_specs=in_specs, out_specs=tokens)(arrays, replicated)
    return jax.tree.map(lambda r: jax.reshard(r, P(TOKEN_AXES)), results)


def without_single_axes(spec: P) -> P:
    """``spec`` without mesh axes of one device. Under ``jax.shard_map``, what differs along such an axis would be summed
    over it in the backward pass: XLA on CPU copies all weights for an all-reduce of one device."""
    sizes = jax.sharding.get_abstract_mesh().shape

    def used(entry):
        axes = tuple(a for a in ((entry,) if isinstance(entry, str) else entry or ()) if sizes.get(a, 1) > 1)
        return axes or None
    return P(*map(used, spec))


def varying_like(value: jax.Array, *others: jax.Array) -> jax.Array:
    """Inside ``per_device``: ``value`` marked as different on every device that ``others`` differ on.

    A loop carry needs one type; and the gradient of a replicated weight so marked is summed over those devices.
    """
    wanted = {axis for other in others for axis in varying_axes(other)} - set(varying_axes(value))
    axes = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis in wanted)
    return jax.lax.pcast(value, axes, to="varying") if axes else value


def varying_axes(x: jax.Array) -> tuple[str, ...]:
    """Under ``jax.shard_map``: the mesh axes along which ``x`` may differ between devices, in the order of the mesh.

    JAX has a set, whose order is another one in every process; a collective over it would then number its devices
    differently in programs that are to be the same, and they would wait for each other for ever.
    """
    kind = jax.typeof(x)
    # Renamed between JAX 0.10 and 0.12.
    varying = kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
    return tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis in varying)


def unmarked(kernel: Callable, *arrays: jax.Array) -> jax.Array:
    """``kernel(*arrays)``, for library kernels that do not mark on which devices their results differ.

    Inside ``per_device`` JAX keeps count of that and refuses such a kernel; here it is left out of the count, and its
    result is marked like the arrays.
    """
    if not jax.sharding.get_abstract_mesh().are_all_axes_manual:
        return kernel(*arrays)
    result = jax.shard_map(kernel, in_specs=P(), out_specs=P(), check_vma=False)(*arrays)
    return varying_like(result, *arrays)


def lowering_platform() -> str:
    """The platform that the program being traced is compiled for: "cpu", "gpu" or "tpu".

    That of the mesh in context; a mesh of a TPU topology, without a TPU, counts. Without a mesh, JAX's default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def concrete_mesh() -> jax.sharding.Mesh | None:
    """The mesh in context with its devices, also while a program is traced; None without one."""
    from jax._src.mesh import get_concrete_mesh  # jax.sharding.get_mesh refuses while tracing

    mesh = get_concrete_mesh()
    return None if mesh is None or mesh.empty else mesh


# What programs for a platform are compiled with: on TPUs an exchange is waited for where its rows are needed, not where it
# starts, so that what does not need them is computed meanwhile (docs/parallelism.md).
COMPILER_OPTIONS = {"tpu": {"xla_tpu_enable_async_all_to_all": True, "xla_tpu_enable_async_ragged_all_to_all": True}}


def compiler_options() -> dict[str, Any]:
    """For ``jax.jit`` and ``lowered.compile``: :data:`COMPILER_OPTIONS` of the platform of the mesh in context."""
    return COMPILER_OPTIONS.get(lowering_platform(), {})


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Where a batch ``[B, ...]`` lies."""
    return NamedSharding(mesh, P(TOKEN_AXES))


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> list[slice]:
    """The rows of a batch that lie on this process's devices, as consecutive ranges, rising; one for a single process."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    ranges: list[slice] = []
    for first, last in sorted({index[0].indices(batch_size)[:2] for index in indices}):
        if ranges and ranges[-1].stop == first:
            ranges[-1] = slice(ranges[-1].start, last)
        else:
            ranges.append(slice(first, last))
    return ranges


# Small parameters every device needs whole.
REPLICATED_PARAMETERS = ("w_router_DE", "w_router_noise_DE", "w_router_group_DX", "w_router_group_noise_DX", "w_constant_DJA",
                         "constant_JD", "w_value_D", "b_value", "scale_D", "scale_R", "bias_D", "copies_EJ",
                         "b_router_E", "w_shared_gate_D")


def parameter_spec(name: str, dimensions: int) -> P:
    """Where a parameter lies, from the letters its name ends in: ``w_in_EDF`` -> ``P('expert', 'fsdp', 'tensor')``.

    Stacked layers have leading dimensions without a letter, which are not sharded. An axis that two letters want is the
    first's: ``w_latent_DR`` -> ``P('fsdp', None)``.
    """
    if name in REPLICATED_PARAMETERS:
        return P()
    letters = name.rsplit("_", 1)[1]
    axes = [PARAMETERS.get(letter) for letter in letters]
    return P(*(None,) * (dimensions - len(letters)), *(None if axis in axes[:i] else axis for i, axis in enumerate(axes)))

