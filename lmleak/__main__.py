"""`python -m lmleak`, and so `accelerate launch -m lmleak` and `torchrun -m lmleak`."""

from lmleak.cli import main

if __name__ == "__main__":
    main(prog_name="lmleak")
