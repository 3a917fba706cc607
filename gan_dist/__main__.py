"""`python -m gan_dist` is `gan-dist`."""

from gan_dist.cli.main import main

if __name__ == "__main__":
    main()
