"""The commands of ``moe-jax``: a module each, with ``add(commands)``, its words, and ``run(arguments, overrides)``."""
