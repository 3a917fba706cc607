"""`python -m gan_dist` is `gan-dist`."""

from gan_dist.cli import main

if __name__ == "__main__":
    main()
