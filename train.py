"""Train one stage: python train.py [group=option ...] [key=value ...]; --help tells more."""

from ldm.cli.train import main

if __name__ == "__main__":
    main()
