"""The web UI: Gradio pages on FastAPI. It starts programs and reads folders; it never imports torch."""
