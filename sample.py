"""Generate images from prompts: python sample.py ckpt=runs/my-run prompt="..."; see --help."""

from ldm.cli.sample import main

if __name__ == "__main__":
    main()
