"""`python -m agp_jax.data`, see `agp_jax.data.command`."""

import sys

from agp_jax.data.command import main

if __name__ == "__main__":
    sys.exit(main())
