"""`python -m synco_fast` and `torchrun -m synco_fast`: the console command."""

from synco_fast.cli import main

main()
