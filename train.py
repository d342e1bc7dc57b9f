"""Entry for `accelerate launch train.py --config x.toml`. The same as `lora-diffusion train`."""

import typer

from lora_diffusion.cli import errors_as_messages, train
from lora_diffusion.launch import complete_cpu_launch, end_quickly, spin_briefly

if __name__ == "__main__":
    spin_briefly()
    end_quickly()
    with errors_as_messages(debug=False):
        complete_cpu_launch()
    typer.run(train)
