"""`python -m surgery.cli`, which is what `torchrun -m` starts."""

from surgery.cli import run

if __name__ == "__main__":
    run()
