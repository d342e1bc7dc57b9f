"""`python -m lora_diffusion …`: the same as `lora-diffusion …`, for launchers that take a module."""

from lora_diffusion.cli import errors_as_messages, main
from lora_diffusion.launch import complete_cpu_launch

if __name__ == "__main__":
    with errors_as_messages(debug=False):
        complete_cpu_launch()
    main()
