"""moe_jax: mixture-of-experts language models in JAX, from the router to the report."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """``from moe_jax import families``, which is only then imported."""
    if name == "families":
        import importlib
        return importlib.import_module("moe_jax.models.families")
    raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
