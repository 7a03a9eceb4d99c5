"""Settings of every test: exact float32 products, and no silent broadcasting of ranks."""

import jax

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
