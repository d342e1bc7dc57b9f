"""Settings of sd-scripts and kohya_ss read as ours."""
