"""`python -m linearize`, so that torchrun can start it: `torchrun --nproc_per_node 2 -m linearize distill DIR`."""

import sys

from linearize.cli import main

sys.exit(main())
