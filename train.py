"""Entry for `accelerate launch train.py --config x.toml`. The same as `lora-diffusion train`."""

import typer

from lora_diffusion.cli import train

if __name__ == "__main__":
    typer.run(train)
