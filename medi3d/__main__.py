"""`python -m medi3d` is `medi3d`; with torchrun it is `torchrun ... -m medi3d train CONFIG`."""

from medi3d.cli.entry import main

if __name__ == "__main__":
    main()
