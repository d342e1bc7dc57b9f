"""What the pages need from disk and from other processes. Nothing here imports gradio."""
