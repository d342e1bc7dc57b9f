"""Pictures from a model and its adapters: one engine for training previews, the command line and regression images."""
