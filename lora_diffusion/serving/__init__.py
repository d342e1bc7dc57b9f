"""The generation engine over HTTP: one process that owns the pipeline and draws for many."""
